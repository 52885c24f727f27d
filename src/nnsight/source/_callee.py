"""What an operation calls, where that can be told without running the function it is in."""

from __future__ import annotations

import ast
import builtins
import textwrap
from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any, cast

from ._instrument import analyse
from ._layers import Function, layers

_LOOK_UPS = ("get", "get_interface")  # of mappings: they find, and change nothing
_NOTHING: Any = object()


def callee_of(function: Any, name: str) -> Function | None:
    """The object that operation `name` of `function` calls, None where only a run can tell.

    Names are looked up as the function would: in its bound object, closure, globals and builtins, and in a
    local variable that is assigned once, from such names or from a look-up in a mapping.
    """
    operation = analyse(function).find(name)
    call = ast.parse(operation.text, mode="eval").body
    found = _Lookup(function).value(call.func) if isinstance(call, ast.Call) else _NOTHING
    return found if found is not _NOTHING and callable(found) else None


class _Lookup:
    def __init__(self, function: Any) -> None:
        found = layers(function)
        self._inner = cast("FunctionType", found[-1])
        bound = [layer.__self__ for layer in found if isinstance(layer, MethodType)]
        self._self = bound[-1] if bound else _NOTHING
        self._known: dict[str, Any] = {}
        source = analyse(function)
        self._tree = ast.parse(textwrap.dedent("\n".join(source.lines)))

    def value(self, node: ast.AST) -> Any:
        """What an expression is, `_NOTHING` where that is not known."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                if node.id not in self._known:
                    self._known[node.id] = _NOTHING  # while it is looked up
                    self._known[node.id] = self._name(node.id)
                return self._known[node.id]
            case ast.Attribute():
                return _attribute(self.value(node.value), node.attr)
            case ast.Call(func=ast.Attribute(value=owner, attr=attr), keywords=[]) if attr in _LOOK_UPS:
                return self._look_up(self.value(owner), attr, [self.value(arg) for arg in node.args])
            case ast.Subscript():
                return self._look_up(self.value(node.value), "__getitem__", [self.value(node.slice)])
            case _:
                return _NOTHING

    def _name(self, name: str) -> Any:
        code = self._inner.__code__
        if name in code.co_varnames or name in code.co_cellvars:
            if code.co_argcount and name == code.co_varnames[0]:
                return self._self
            return self._local(name)
        if name in code.co_freevars:
            try:
                return (self._inner.__closure__ or ())[code.co_freevars.index(name)].cell_contents
            except ValueError:
                return _NOTHING
        return self._inner.__globals__.get(name, getattr(builtins, name, _NOTHING))

    def _local(self, name: str) -> Any:
        code = self._inner.__code__
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        stored = [
            node
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load)
        ]
        if len(stored) != 1 or name in parameters:
            return _NOTHING
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign) and node.targets == stored:
                return self.value(node.value)
            if isinstance(node, ast.AnnAssign) and node.target is stored[0] and node.value is not None:
                return self.value(node.value)
        return _NOTHING

    def _look_up(self, mapping: Any, method: str, args: list[Any]) -> Any:
        if not isinstance(mapping, Mapping) or any(arg is _NOTHING for arg in args):
            return _NOTHING
        try:
            return getattr(mapping, method)(*args)
        except Exception:
            return _NOTHING


def _attribute(owner: Any, name: str) -> Any:
    if owner is _NOTHING:
        return _NOTHING
    try:
        return getattr(owner, name)
    except Exception:
        return _NOTHING
