"""From a syntax tree to code that can stand in a function's place.

The tree is compiled inside a scaffold of an enclosing function and class, so that free variables,
``super()``, ``__class__`` and private names mean what they mean in the file, on the file's own lines.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType
from typing import Any, TypeVar

from nnsight.errors import SourceError

from ._operations import Definition
from ._rewrite import DISPATCH

Scope = TypeVar("Scope", ast.FunctionDef, ast.ClassDef)

SCAFFOLD = "__nnsight_scaffold__"
FUTURE_FLAGS = sum(
    getattr(__future__, name).compiler_flag
    for name in __future__.all_feature_names
    if name not in ("nested_scopes", "generators")
)
# Flags that where a function stands or `types.coroutine` give it.
OUTER_FLAGS = inspect.CO_NESTED | inspect.CO_ITERABLE_COROUTINE


def compile_in_place(definition: Definition, function: FunctionType, imported: Iterable[str]) -> CodeType:
    """The code of a definition as it would be where the function was defined; DISPATCH is free in it.

    ``imported`` are the global names that the function's file imports: calls of their attributes compile to
    other code than calls of methods.
    """
    code = function.__code__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaffold = _scaffold(definition, function, imported)
        flags = code.co_flags & FUTURE_FLAGS
        module = compile(scaffold, code.co_filename, "exec", flags=flags, dont_inherit=True)
    compiled = _find(module, code)
    if compiled is None:
        raise SourceError(f"{function.__qualname__} cannot be compiled again from {code.co_filename}")
    flags = compiled.co_flags & ~OUTER_FLAGS | code.co_flags & OUTER_FLAGS
    return _renamed(compiled, _without_scaffold(code.co_name, qualified_name(function))).replace(co_flags=flags)


def qualified_name(function: FunctionType) -> str:
    return getattr(function.__code__, "co_qualname", function.__qualname__)  # from Python 3.11 on


def _scaffold(definition: Definition, function: FunctionType, imported: Iterable[str]) -> ast.Module:
    free = function.__code__.co_freevars
    inner: ast.stmt = _function([name for name in free if name != "__class__"], definition.name, definition)
    class_name = _class_name(function) or ("_" if "__class__" in free else None)
    if class_name is not None:
        inner = _typeless(ast.ClassDef(class_name, [], [], [inner], []))
    imports = [ast.Import([ast.alias(name)]) for name in sorted(imported)]
    return ast.fix_missing_locations(ast.Module([*imports, _function([DISPATCH], class_name, inner)], []))


def _function(parameters: list[str], defined: str | None, body: ast.stmt) -> ast.FunctionDef:
    """A function around a body; the name that the body defines is global unless it is a parameter."""
    declared: list[ast.stmt] = [ast.Global([defined])] if defined and defined not in parameters else []
    arguments = ast.arguments([], [ast.arg(name) for name in parameters], None, [], [], None, [])
    return _typeless(ast.FunctionDef(SCAFFOLD, arguments, [*declared, body], []))


def _typeless(node: Scope) -> Scope:
    if "type_params" in node._fields:  # required from Python 3.12 on
        setattr(node, "type_params", [])  # noqa: B010
    return node


def _class_name(function: FunctionType) -> str | None:
    """The innermost class around a function's definition."""
    scopes = re.sub(r"[^.]+\.<locals>\.", "", qualified_name(function)).split(".")[:-1]
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


def _without_scaffold(name: str, qualified: str) -> Callable[[str], str]:
    """What turns the names of the function and of what is defined in it into those they have in the file."""
    scaffold = rf"{SCAFFOLD}\.<locals>\."
    own = re.compile(rf"(?:{scaffold}(?:\w+\.(?={scaffold}))?)*{re.escape(name)}(?=\.<locals>\.|$)")

    def rename(found: str) -> str:
        match = own.match(found)
        return f"{qualified}{found[match.end() :]}" if match else found

    return rename


def _renamed(code: CodeType, rename: Callable[[str], str]) -> CodeType:
    constants = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            constants.append(_renamed(constant, rename))
        elif isinstance(constant, str) and ".<locals>." in constant:
            constants.append(rename(constant))
        else:
            constants.append(constant)
    changes: dict[str, Any] = {"co_consts": tuple(constants)}
    if hasattr(code, "co_qualname"):  # from Python 3.11 on
        changes["co_qualname"] = rename(getattr(code, "co_qualname"))  # noqa: B009
    return code.replace(**changes)
