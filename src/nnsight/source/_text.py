"""The text of a function, parsed, and checked to be what the function runs."""

from __future__ import annotations

import ast
import inspect
import linecache
import warnings
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType

from nnsight.errors import SourceError

from ._compile import compile_in_place
from ._operations import Definition
from ._rewrite import DISPATCH

PYTEST = "@pytest_ar"
NOT_FOUND = (
    "{name} has no Python source that can be read: there is no definition of it at line {line} of {file};"
    " its inputs and output are still available at the calling operation"
)
CHANGED = (
    "{name} does not run what {file} says at line {line}: the file was edited after it was imported, or an"
    " import hook rewrote it. Import it again to see its operations"
)


@dataclass(frozen=True)
class Text:
    """The lines of a function, what they parse to, and the global names that its module imports."""

    lines: tuple[str, ...]
    definition: Definition
    imported: frozenset[str]


def read(function: FunctionType) -> Text:
    """The text of a function; `SourceError` where there is none that it runs."""
    code, name = function.__code__, function.__qualname__
    if DISPATCH in code.co_freevars:
        raise SourceError(f"{name} is instrumented already; instrument the function it was made from")
    if code.co_name == "<lambda>":
        raise SourceError(f"{name} is a lambda; define it with `def` to see its operations")
    text = _parse(function)
    if text is None or not _runs(text, function):
        linecache.checkcache(code.co_filename)
        text = _parse(function)
    if text is None:
        raise SourceError(NOT_FOUND.format(name=name, file=code.co_filename, line=code.co_firstlineno))
    if not _runs(text, function):
        raise SourceError(CHANGED.format(name=name, file=code.co_filename, line=code.co_firstlineno))
    return text


def _parse(function: FunctionType) -> Text | None:
    code = function.__code__
    file = linecache.getlines(code.co_filename, function.__globals__)
    try:
        lines = inspect.getblock(file[code.co_firstlineno - 1 :])
        indented = lines[0][:1].isspace()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse("if 1:\n" * indented + "".join(lines))
    except (IndexError, SyntaxError):
        return None
    node = tree.body[0].body[0] if isinstance(tree.body[0], ast.If) else tree.body[0]
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name != code.co_name:
        return None
    ast.increment_lineno(tree, code.co_firstlineno - 1 - indented)
    return Text(tuple(line.rstrip("\n") for line in lines), node, _imported("".join(file)))


@lru_cache(maxsize=32)
def _imported(file: str) -> frozenset[str]:
    """The global names that a file binds by importing: calls of their attributes compile to other code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            statements: list[ast.AST] = list(ast.parse(file).body)
    except SyntaxError:
        return frozenset()
    names: set[str] = set()
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif not isinstance(node, ast.expr | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            statements += ast.iter_child_nodes(node)
    return frozenset(names - {"*"})


def _runs(text: Text, function: FunctionType) -> bool:
    """Whether the function runs what the text says."""
    code = function.__code__
    try:
        compiled = compile_in_place(text.definition, function, text.imported)
    except (SourceError, SyntaxError):
        return False
    if PYTEST in code.co_names:  # a test module, whose assertions pytest rewrites
        return set(compiled.co_names) <= set(code.co_names)
    return compiled == code
