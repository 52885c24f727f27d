"""From a function to its syntax tree, and from a tree to code that can stand in the function's place.

A tree is compiled inside a scaffold of an enclosing function and class, so that free variables, ``super()``,
``__class__`` and private names mean what they mean in the file, on the file's own lines.
"""

from __future__ import annotations

import __future__
import ast
import inspect
import linecache
import warnings
from dataclasses import dataclass
from types import CodeType, FunctionType

from nnsight.errors import SourceError
from nnsight.source._operations import Definition
from nnsight.source._rewrite import DISPATCH

FUTURE_FLAGS = sum(
    getattr(__future__, name).compiler_flag
    for name in __future__.all_feature_names
    if name not in ("nested_scopes", "generators")
)
CHANGED = (
    "{name} does not do what {file} says at line {line}: the file was edited after it was imported, or an import hook"
    " rewrote it. Import it again to see its operations"
)


@dataclass(frozen=True)
class Text:
    """The lines of a function and what they parse to."""

    lines: tuple[str, ...]
    definition: Definition


def read(function: FunctionType) -> Text:
    """The text of a function, which is checked to be what the function runs."""
    code = function.__code__
    if DISPATCH in code.co_freevars:
        raise SourceError(
            f"{function.__qualname__} is instrumented already; instrument the function it came from"
        )
    if code.co_name == "<lambda>":
        raise SourceError(f"{function.__qualname__} is a lambda; define it with `def` to see its operations")
    text = _parse(function)
    if text is None or not _runs(text.definition, function):
        linecache.checkcache(code.co_filename)
        text = _parse(function)
    if text is None:
        raise SourceError(
            f"{function.__qualname__} has no Python source that can be read: there is no definition of it"
            f" at line {code.co_firstlineno} of {code.co_filename}"
        )
    if not _runs(text.definition, function):
        place = {"file": code.co_filename, "line": code.co_firstlineno}
        raise SourceError(CHANGED.format(name=function.__qualname__, **place))
    return text


def compile_in_place(definition: Definition, function: FunctionType) -> CodeType:
    """The code of a definition as it would be where the function was defined; DISPATCH is free in it."""
    code = function.__code__
    scaffold = _scaffold(definition, code.co_freevars, _class_name(function))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flags = code.co_flags & FUTURE_FLAGS
        module = compile(scaffold, code.co_filename, "exec", flags=flags, dont_inherit=True)
    compiled = _find(module, code)
    if compiled is None:
        raise SourceError(f"{function.__qualname__} cannot be compiled again from {code.co_filename}")
    changes = {"co_qualname": code.co_qualname} if hasattr(code, "co_qualname") else {}  # Python 3.11
    return compiled.replace(co_flags=_flags(compiled, code), **changes)


def _parse(function: FunctionType) -> Text | None:
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)[code.co_firstlineno - 1 :]
    try:
        lines = inspect.getblock(lines)
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
    return Text(tuple(line.rstrip("\n") for line in lines), node)


def _runs(definition: Definition, function: FunctionType) -> bool:
    """Whether the function runs what the definition says."""
    code = function.__code__
    try:
        compiled = compile_in_place(definition, function)
    except (SourceError, SyntaxError):
        return False
    if any(isinstance(node, ast.Assert) for node in ast.walk(definition)):  # pytest rewrites assertions
        same = compiled.co_varnames[: compiled.co_argcount] == code.co_varnames[: code.co_argcount]
        return same and set(compiled.co_names) <= set(code.co_names)
    return compiled == code


def _scaffold(definition: Definition, free: tuple[str, ...], class_name: str | None) -> ast.Module:
    visible = [name for name in free if name != "__class__"]
    inner: ast.stmt = _function(visible, definition.name, definition)
    if class_name is not None or "__class__" in free:
        inner = _class(class_name or "_", inner)
    outer = _function([DISPATCH], class_name, inner)
    return ast.fix_missing_locations(ast.Module([outer], []))


def _function(parameters: list[str], defined: str | None, body: ast.stmt) -> ast.FunctionDef:
    """``def scaffold(parameters): body``; the name that the body defines is global unless it is a parameter."""
    declared: list[ast.stmt] = [ast.Global([defined])] if defined and defined not in parameters else []
    arguments = ast.arguments([], [ast.arg(name) for name in parameters], None, [], [], None, [])
    return _typeless(ast.FunctionDef("scaffold", arguments, [*declared, body], []))


def _class(name: str, body: ast.stmt) -> ast.ClassDef:
    return _typeless(ast.ClassDef(name, [], [], [body], []))


def _typeless(node):  # noqa: ANN001, ANN202
    if "type_params" in node._fields:  # required from Python 3.12 on
        node.type_params = []
    return node


def _class_name(function: FunctionType) -> str | None:
    """The innermost class around a function's definition."""
    qualified = getattr(function.__code__, "co_qualname", function.__qualname__)
    parts = qualified.split(".")[:-1]
    followers = [*parts[1:], ""]
    classes = [
        part for part, follower in zip(parts, followers, strict=True) if "<locals>" not in (part, follower)
    ]
    return classes[-1] if classes else None


def _find(code: CodeType, wanted: CodeType) -> CodeType | None:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if (constant.co_name, constant.co_firstlineno) == (wanted.co_name, wanted.co_firstlineno):
                return constant
            found = _find(constant, wanted)
            if found is not None:
                return found
    return None


def _flags(compiled: CodeType, code: CodeType) -> int:
    return compiled.co_flags & ~inspect.CO_NESTED | code.co_flags & inspect.CO_NESTED
