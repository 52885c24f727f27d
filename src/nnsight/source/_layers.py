"""What is around a function: bound methods, partials and decorators, taken off and put on again.

Decorators are never run again. A wrapper is copied with the closure cell that holds the inner function
replaced; one that reaches it some other way (an attribute, a global) has its own calls watched for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from nnsight.errors import SourceError

Function = Callable[..., Any]
DEEPEST = 64
NESTED = 3  # closures searched within closures
# From Python 3.14 on, reading the annotations would evaluate them.
ANNOTATIONS = "__annotate__" if hasattr(FunctionType, "__annotate__") else "__annotations__"
GENERIC = ("__type_params__",) if hasattr(FunctionType, "__type_params__") else ()
COPIED = ("__kwdefaults__", "__qualname__", "__module__", "__doc__", ANNOTATIONS, *GENERIC)
BUILT_IN = ("builtin_function_or_method", "method_descriptor", "wrapper_descriptor", "method-wrapper")

NO_SOURCE = "{what} has no Python source; its inputs and output are still available at the calling operation"
NOT_OPEN = (
    "{what} wraps a function in a way that cannot be followed: only Python functions, bound methods and"
    " functools.partial can be copied with another function inside. Instrument {what}.__wrapped__ instead"
)


def layers(function: Any, unwrap: bool = True) -> list[Function]:
    """From a callable to the Python function at the heart of it, each one the inner of the one before."""
    found = [callable_of(function)]
    while (inner := _inner(found[-1], unwrap)) is not None:
        found.append(inner)
        if len(found) > DEEPEST:
            raise SourceError(f"{name_of(function)} is wrapped more than {DEEPEST} times, or wraps itself")
    if not isinstance(found[-1], FunctionType):
        raise SourceError(_refusal(found[-1]))
    return found


def callable_of(function: Any) -> Function:
    """What runs when an object is called: a module's ``forward``, another object's ``__call__``."""
    if isinstance(function, nn.Module):
        return function.forward
    if isinstance(function, FunctionType | MethodType | partial | type) or hasattr(function, "__wrapped__"):
        return function
    call = getattr(type(function), "__call__", None)  # noqa: B004
    return MethodType(call, function) if isinstance(call, FunctionType) else function


def with_inner(layer: Function, inner: Function, new: Function, reroute: Callable[..., Function]) -> Function:
    """A copy of a layer that has ``new`` where it has ``inner``."""
    replaced = _replace(layer, inner, new)
    if replaced is not layer:
        return replaced
    wrapper = layer.func if isinstance(layer, partial) else layer
    try:
        watched = reroute(wrapper, inner, new)
    except SourceError as error:
        raise SourceError(f"{name_of(layer)} wraps {name_of(inner)} out of reach: {error}") from None
    return partial(watched, *layer.args, **layer.keywords) if isinstance(layer, partial) else watched


def same(one: Any, other: Any) -> bool:
    """Whether two callables are one, where each look-up of a bound method makes a new object."""
    if isinstance(one, MethodType) and isinstance(other, MethodType):
        return one.__func__ is other.__func__ and one.__self__ is other.__self__
    return one is other


def copy_function(function: FunctionType, code: CodeType, cells: tuple[CellType, ...]) -> FunctionType:
    """The same function, with other code or other cells."""
    new = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, cells)
    for attribute in COPIED:
        setattr(new, attribute, getattr(function, attribute))
    new.__dict__.update(function.__dict__)
    return new


def name_of(function: Any) -> str:
    if isinstance(function, partial):
        return f"partial({name_of(function.func)})"
    return getattr(function, "__qualname__", None) or type(function).__qualname__


def _inner(layer: Function, unwrap: bool) -> Function | None:
    if isinstance(layer, MethodType):
        return layer.__func__
    wrapped = getattr(layer, "__wrapped__", None) if unwrap else None
    if isinstance(layer, partial):
        return layer.func if wrapped is None else wrapped
    if wrapped is not None and not isinstance(layer, FunctionType):
        raise SourceError(NOT_OPEN.format(what=name_of(layer)))
    return wrapped


def _replace(value: Any, inner: Function, new: Function, within: tuple[Any, ...] = ()) -> Any:
    """A copy of ``value`` with ``new`` for ``inner``; ``value`` itself where it does not hold ``inner``."""
    if same(value, inner):
        return new
    if isinstance(value, MethodType):
        function = _replace(value.__func__, inner, new, within)
        return value if function is value.__func__ else MethodType(function, value.__self__)
    if isinstance(value, partial):
        return _replace_in_partial(value, inner, new, within)
    if isinstance(value, FunctionType) and value.__closure__ and len(within) < NESTED and value not in within:
        return _replace_cells(value, inner, new, (*within, value))
    return value


def _replace_in_partial(value: partial[Any], inner: Function, new: Function, within: tuple[Any, ...]) -> Any:
    function = _replace(value.func, inner, new, within)
    held = (*value.args, *value.keywords.values())
    if function is value.func and not any(same(argument, inner) for argument in held):
        return value
    args = [new if same(argument, inner) else argument for argument in value.args]
    keywords = {key: new if same(held, inner) else held for key, held in value.keywords.items()}
    return partial(function, *args, **keywords)


def _replace_cells(function: FunctionType, inner: Function, new: Function, within: tuple[Any, ...]) -> FunctionType:
    cells = function.__closure__ or ()
    replaced = tuple(_replace_cell(cell, inner, new, within) for cell in cells)
    if all(old is cell for old, cell in zip(cells, replaced, strict=True)):
        return function
    copied = copy_function(function, function.__code__, replaced)
    if same(getattr(copied, "__wrapped__", None), inner):
        copied.__dict__["__wrapped__"] = new
    return copied


def _replace_cell(cell: CellType, inner: Function, new: Function, within: tuple[Any, ...]) -> CellType:
    try:
        held = cell.cell_contents
    except ValueError:  # nothing was bound to the name yet
        return cell
    replaced = _replace(held, inner, new, within)
    return cell if replaced is held else CellType(replaced)


def _refusal(function: Any) -> str:
    name, kind = name_of(function), type(function).__name__
    if isinstance(function, type):
        return f"{name} is a class, not a function; its arguments and the object are still available"
    return NO_SOURCE.format(what=f"<built-in {name}>" if kind in BUILT_IN else f"{name}, a {kind},")
