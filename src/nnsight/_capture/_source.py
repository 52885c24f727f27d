"""The source text that a frame's code was compiled from, and whether it still is."""

import __future__

import ast
import linecache
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from dis import get_instructions
from functools import cached_property
from importlib.machinery import SourceFileLoader
from types import CodeType, FrameType

from ..errors import CaptureError
from ._cache import IdentityCache
from ._codes import is_same_code, nested_codes
from ._text import Text

FUTURES = __future__.annotations.compiler_flag  # all others are part of the language now

NO_SOURCE = """\
{where}: the source of this with-block is not available, and its body runs later, or elsewhere, from its
source. Put the code into a file, a notebook or IPython (`exec`, and `python` before 3.13, keep no source), or
use a form that needs none: `for step in tracer.iter[...]:` in place of `with tracer.iter[...]:`."""

STALE = """\
{where}: the source of this with-block is no longer the code that is running: {filename!r} has changed
since it was loaded. Restart Python, or load the file again (`importlib.reload`, or run the cell again)."""

_sources: IdentityCache[list[str], "Source"] = IdentityCache(64)


@dataclass(frozen=True)
class Source:
    """The text of one file, parsed once."""

    text: Text
    _compiled: dict[int, CodeType] = field(default_factory=dict, compare=False)

    def compiled(self, code: CodeType) -> CodeType:
        """The code of the whole file, compiled as `code` was."""
        flags = code.co_flags & FUTURES
        if flags not in self._compiled:
            self._compiled[flags] = _compile(self.tree, code)
        return self._compiled[flags]

    @cached_property
    def tree(self) -> ast.Module:
        return self.text.parse()

    @cached_property
    def sites(self) -> "list[Site]":
        return list(_sites(self.tree.body, "", None, None))


@dataclass(frozen=True)
class Site:
    """A with-statement, and the function and class it stands in."""

    node: ast.With | ast.AsyncWith
    function: str
    owner: str | None
    first_argument: str | None
    statement: ast.stmt | None = None  # the top-level statement of the file that it is part of


def where(frame: FrameType) -> str:
    return f'File "{frame.f_code.co_filename}", line {frame.f_lineno}'


def sources_of(frame: FrameType) -> Iterator[Source]:
    """The source as it was read first, then as it is now if that is different, and as it is in the file."""
    filename = frame.f_code.co_filename
    lines = linecache.getlines(filename, frame.f_globals)
    if not lines:
        raise CaptureError(NO_SOURCE.format(where=where(frame)))
    yield _source(lines)
    linecache.checkcache(filename)
    again = linecache.getlines(filename, frame.f_globals)
    if again and again is not lines:
        yield _source(again)
    own = _read(filename)  # a job that runs in another thread may show its own text under this name
    if own:
        yield _source(own)


def _read(filename: str) -> list[str]:
    try:
        with tokenize.open(filename) as file:
            return file.readlines()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []


def stale(frame: FrameType) -> CaptureError:
    return CaptureError(STALE.format(where=where(frame), filename=frame.f_code.co_filename))


def is_current(code: CodeType, site: Site, source: Source, frame: FrameType) -> bool:
    """Whether compiling the source again gives the code of the frame."""
    lines = _lines_without_asserts(site.node)
    for fresh in _compiled(code, site, source):
        if is_same_code(fresh, code, placed=True):
            return True
        # An import hook, as of pytest, may have added to the code; what the source says must be there.
        if _is_hooked(frame) and _facts(fresh, lines) <= _facts(code, lines):
            return True
    return False


def sites_in(statements: list[ast.stmt], function: str, owner: str | None, argument: str | None) -> list[Site]:
    """The with-statements below some statements of a function, in the order of the text."""
    return list(_sites(statements, "" if function == "<module>" else f"{function}.<locals>", owner, argument))


def _source(lines: list[str]) -> Source:
    found = _sources.get(lines)
    if found is None:
        found = Source(Text("".join(lines).replace("\r\n", "\n").replace("\r", "\n")))
        _sources.put(lines, found)
    return found


def _sites(
    nodes: Sequence[ast.AST],
    function: str,
    owner: str | None,
    argument: str | None,
    top: ast.stmt | None = None,
) -> Iterator[Site]:
    for node in nodes:
        root = top or (node if isinstance(node, ast.stmt) else None)
        inside = [child for child in ast.iter_child_nodes(node) if isinstance(child, _SUITES)]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = next(iter([*node.args.posonlyargs, *node.args.args]), None)
            name = f"{function}.{node.name}" if function else node.name
            yield from _sites(inside, f"{name}.<locals>", owner, first and first.arg, root)
        elif isinstance(node, ast.ClassDef):
            name = f"{function}.{node.name}" if function else node.name
            yield from _sites(inside, name, node.name, None, root)
        else:
            if isinstance(node, ast.With | ast.AsyncWith):
                yield Site(node, function.removesuffix(".<locals>") or "<module>", owner, argument, root)
            yield from _sites(inside, function, owner, argument, root)


_SUITES = (ast.stmt, ast.ExceptHandler, ast.match_case)


def _compiled(code: CodeType, site: Site, source: Source) -> Iterator[CodeType]:
    """The ways in which the frame's code may have been compiled; imports elsewhere in the file matter."""
    assert site.statement is not None
    yield from _alike(source.compiled(code), code, site)
    # A notebook compiles the statements of a cell one by one, and a prompt in "single" mode
    yield from _alike(_compile(ast.Module([site.statement], []), code), code, site)
    yield from _alike(_compile(ast.Interactive([site.statement]), code), code, site)


def _alike(module: CodeType, code: CodeType, site: Site) -> Iterator[CodeType]:
    if site.function == "<module>":
        yield module
    else:
        key = (code.co_name, code.co_firstlineno)
        yield from (found for found in nested_codes(module) if (found.co_name, found.co_firstlineno) == key)


def _compile(tree: ast.Module | ast.Interactive, code: CodeType) -> CodeType:
    mode = "exec" if isinstance(tree, ast.Module) else "single"
    flags = code.co_flags & FUTURES | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    return compile(tree, code.co_filename, mode, flags=flags, dont_inherit=True)


def _is_hooked(frame: FrameType) -> bool:
    spec = frame.f_globals.get("__spec__")
    loader = spec.loader if spec is not None else frame.f_globals.get("__loader__")
    return type(loader) is not SourceFileLoader


def _lines_without_asserts(node: ast.With | ast.AsyncWith) -> set[int]:
    lines = set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for child in ast.walk(node):
        if isinstance(child, ast.Assert):
            lines -= set(range(child.lineno, (child.end_lineno or child.lineno) + 1))
    return lines


def _facts(code: CodeType, lines: set[int]) -> set[tuple[int, str]]:
    """The names and constants that the code uses on some lines."""
    facts, line = set[tuple[int, str]](), 0
    for instruction in get_instructions(code):
        line = _line_of(instruction, line)
        value = instruction.argval
        if line not in lines or value is None:
            continue
        if isinstance(value, int) and instruction.opname != "LOAD_CONST":  # the target of a jump, a count
            continue
        if isinstance(value, CodeType):
            facts |= _facts(value, lines)
        else:
            for one in value if isinstance(value, tuple) else (value,):
                facts.add((line, f"{type(one).__name__} {one!r}"))
    return facts


def _line_of(instruction: object, before: int) -> int:
    """The line of an instruction of `dis`, which has said so in three ways."""
    if sys.version_info >= (3, 11):
        positions = instruction.positions  # type: ignore[attr-defined]
        return (positions and positions.lineno) or before
    return instruction.starts_line or before  # type: ignore[attr-defined]
