"""Tuples whose items can be assigned: `module.output[0] = x` on a module that returns a tuple."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable
from typing import Any, cast

from ..errors import EditError

Write = Callable[[tuple[Any, ...]], None]

_classes: dict[type, type[AssignableTuple]] = {}
_FIRST = tuple.__basicsize__  # where CPython keeps the first item of a tuple
_SIZE = ctypes.sizeof(ctypes.c_void_p)


class AssignableTuple(tuple):  # pyright: ignore[reportMissingTypeArgument]
    """A tuple as a module returned it; assigning an item puts a changed tuple in its place.

    `native` is the class to give back to the model, so that named tuples stay what they are.
    """

    native: type = tuple
    _write: Write

    def __getitem__(self, index: Any) -> Any:
        found = tuple.__getitem__(self, index)
        if type(found) is tuple and isinstance(index, int):
            return as_assignable(found, lambda changed: self.__setitem__(index, changed))
        return found

    def __setitem__(self, index: Any, value: Any) -> None:
        changed = list(self)
        changed[index] = value
        if len(changed) != len(self):
            raise EditError(f"A tuple of {len(self)} items cannot become one of {len(changed)}: assign a whole tuple.")
        self._write(rebuild(self.native, changed))
        for i, item in enumerate(changed):
            _exchange(self, i, item)

    def __hash__(self) -> int:
        return hash(tuple(self))  # not kept with the tuple, as newer versions of Python do

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, other)

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (self.native, list(self))

    @classmethod
    def _make(cls, items: Any) -> Any:
        # What a named tuple's `_replace` calls.
        return rebuild(cls.native, list(items))


def _exchange(view: AssignableTuple, i: int, item: Any) -> None:
    # Functions written in C, and the fields of named tuples, read the tuple itself.  Nobody else holds this one, which
    # was made for the block, so exchanging an item is no more than it would be in a list.
    old = tuple.__getitem__(view, i)
    if item is old:
        return
    slot = ctypes.c_void_p.from_address(id(view) + _FIRST + i * _SIZE)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))
    slot.value = id(item)
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(old))


def rebuild(kind: type, items: list[Any]) -> Any:
    """A tuple of class `kind` (a named tuple keeps its class)."""
    try:
        return tuple.__new__(cast("type[tuple[Any, ...]]", kind), items)
    except TypeError:  # a class made in C: torch.Size
        return kind(items)


def as_assignable(value: tuple[Any, ...], write: Write) -> tuple[Any, ...]:
    """`value` with item assignment; each assignment calls `write` with the changed tuple."""
    kind = type(value)
    cls = _classes.get(kind)
    if cls is None:
        cls = _classes[kind] = _make_class(kind)
    view = tuple.__new__(cls, value)
    view._write = write
    return view


def _make_class(kind: type) -> type[AssignableTuple]:
    bases = (AssignableTuple,) if kind is tuple else (AssignableTuple, kind)
    name = f"Assignable{kind.__name__}"
    try:
        return type(name, bases, {"native": kind})
    except TypeError:  # made in C, as what `torch.max` returns
        fields = getattr(kind, "__match_args__", ())
        named = {field: property(operator.itemgetter(i)) for i, field in enumerate(fields)}
        return type(name, (AssignableTuple,), {"native": kind, **named})


def as_native(value: Any) -> Any:
    """`value` with every assignable tuple in it turned back into what the model knows."""
    if isinstance(value, AssignableTuple):
        return rebuild(value.native, [as_native(item) for item in value])
    if type(value) in (tuple, list):
        return type(value)(as_native(item) for item in value)
    if type(value) is dict:
        return {key: as_native(item) for key, item in value.items()}
    shown = getattr(type(value), "_as_native", None)  # a value shown in another form than the model's
    return value if shown is None else shown(value)
