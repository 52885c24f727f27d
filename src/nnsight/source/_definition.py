"""From a function to its syntax tree, and from a tree to code that can stand in the function's place.

A tree is compiled inside a scaffold of an enclosing function and class, so that free variables, ``super()``,
``__class__`` and private names mean what they mean in the file, on the file's own lines.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import linecache
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, TypeVar

from nnsight.errors import SourceError
from nnsight.source._operations import Definition
from nnsight.source._rewrite import DISPATCH

Scope = TypeVar("Scope", ast.FunctionDef, ast.ClassDef)

FUTURE_FLAGS = sum(
    getattr(__future__, name).compiler_flag
    for name in __future__.all_feature_names
    if name not in ("nested_scopes", "generators")
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
    """The text of a function, which is checked to be what the function runs."""
    code = function.__code__
    if DISPATCH in code.co_freevars:
        raise SourceError(
            f"{function.__qualname__} is instrumented already; instrument the function it came from"
        )
    if code.co_name == "<lambda>":
        raise SourceError(f"{function.__qualname__} is a lambda; define it with `def` to see its operations")
    text = _parse(function)
    if text is None or not _runs(text, function):
        linecache.checkcache(code.co_filename)
        text = _parse(function)
    if text is None:
        raise SourceError(
            f"{function.__qualname__} has no Python source that can be read: there is no definition of it"
            f" at line {code.co_firstlineno} of {code.co_filename}"
        )
    if not _runs(text, function):
        place = {"file": code.co_filename, "line": code.co_firstlineno}
        raise SourceError(CHANGED.format(name=function.__qualname__, **place))
    return text


def compile_in_place(text: Text, function: FunctionType) -> CodeType:
    """The code of a definition as it would be where the function was defined; DISPATCH is free in it."""
    code = function.__code__
    scaffold = _scaffold(text, code, _class_name(function))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flags = code.co_flags & FUTURE_FLAGS
        module = compile(scaffold, code.co_filename, "exec", flags=flags, dont_inherit=True)
    compiled = _find(module, code)
    if compiled is None:
        raise SourceError(f"{function.__qualname__} cannot be compiled again from {code.co_filename}")
    changes: dict[str, Any] = {"co_flags": _flags(compiled, code)}
    if hasattr(code, "co_qualname"):  # from Python 3.11 on
        changes["co_qualname"] = getattr(code, "co_qualname")  # noqa: B009
    return compiled.replace(**changes)


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
        compiled = compile_in_place(text, function)
    except (SourceError, SyntaxError):
        return False
    if any(isinstance(node, ast.Assert) for node in ast.walk(text.definition)):  # pytest rewrites assertions
        same = compiled.co_varnames[: compiled.co_argcount] == code.co_varnames[: code.co_argcount]
        return same and set(compiled.co_names) <= set(code.co_names)
    return compiled == code


def _scaffold(text: Text, code: CodeType, class_name: str | None) -> ast.Module:
    visible = [name for name in code.co_freevars if name != "__class__"]
    inner: ast.stmt = _function(visible, text.definition.name, text.definition)
    if class_name is not None or "__class__" in code.co_freevars:
        inner = _class(class_name or "_", inner)
    imports = [ast.Import([ast.alias(name)]) for name in sorted(text.imported.intersection(code.co_names))]
    return ast.fix_missing_locations(ast.Module([*imports, _function([DISPATCH], class_name, inner)], []))


def _function(parameters: list[str], defined: str | None, body: ast.stmt) -> ast.FunctionDef:
    """A function around a body; the name that the body defines is global unless it is a parameter."""
    declared: list[ast.stmt] = [ast.Global([defined])] if defined and defined not in parameters else []
    arguments = ast.arguments([], [ast.arg(name) for name in parameters], None, [], [], None, [])
    return _typeless(ast.FunctionDef("scaffold", arguments, [*declared, body], []))


def _class(name: str, body: ast.stmt) -> ast.ClassDef:
    return _typeless(ast.ClassDef(name, [], [], [body], []))


def _typeless(node: Scope) -> Scope:
    if "type_params" in node._fields:  # required from Python 3.12 on
        setattr(node, "type_params", [])  # noqa: B010
    return node


def _class_name(function: FunctionType) -> str | None:
    """The innermost class around a function's definition."""
    qualified = getattr(function.__code__, "co_qualname", function.__qualname__)
    scopes = re.sub(r"[^.]+\.<locals>\.", "", qualified).split(".")[:-1]
    return scopes[-1] if scopes else None


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
