"""Tuples whose items can be assigned: `module.output[0] = x` on a module that returns a tuple."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

Write = Callable[[tuple[Any, ...]], None]

_classes: dict[type, type[AssignableTuple]] = {}


class AssignableTuple(tuple):
    """A tuple as a module returned it; assigning an item puts a changed tuple in its place.

    `native` is the class to give back to the model, so that named tuples stay what they are.
    """

    native: type = tuple
    _items: list[Any]
    _write: Write

    def __getitem__(self, index: Any) -> Any:
        found = self._items[index]
        if type(found) is tuple and isinstance(index, int):
            return as_assignable(found, lambda changed: self.__setitem__(index, changed))
        return tuple(found) if isinstance(index, slice) else found

    def __setitem__(self, index: Any, value: Any) -> None:
        changed = list(self._items)
        changed[index] = value
        self._write(rebuild(self.native, changed))
        self._items[:] = changed

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        return tuple(self._items) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(self._items))

    def __repr__(self) -> str:
        return repr(tuple(self._items))

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (self.native, list(self._items))


def rebuild(kind: type, items: list[Any]) -> Any:
    """A tuple of class `kind` (a named tuple keeps its class)."""
    try:
        return tuple.__new__(cast("type[tuple[Any, ...]]", kind), items)
    except TypeError:  # a class made in C: torch.Size
        return kind(items)


def as_assignable(value: tuple[Any, ...], write: Write) -> AssignableTuple:
    """`value` with item assignment; each assignment calls `write` with the changed tuple."""
    kind = type(value)
    cls = _classes.get(kind)
    if cls is None:
        bases = (AssignableTuple,) if kind is tuple else (AssignableTuple, kind)
        cls = _classes[kind] = type(f"Assignable{kind.__name__}", bases, {"native": kind})
    view = tuple.__new__(cls, value)
    view._items = list(value)
    view._write = write
    return view


def as_native(value: Any) -> Any:
    """`value` with every assignable tuple in it turned back into what the model knows."""
    if isinstance(value, AssignableTuple):
        return rebuild(value.native, [as_native(item) for item in value._items])
    if type(value) in (tuple, list):
        return type(value)(as_native(item) for item in value)
    if type(value) is dict:
        return {key: as_native(item) for key, item in value.items()}
    shown = getattr(type(value), "_as_native", None)  # a value shown in another form than the model's
    return value if shown is None else shown(value)
