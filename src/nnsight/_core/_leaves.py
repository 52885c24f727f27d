"""Leaves: every tensor in a value by where it is there, `.1.past_key_values.layers.0.keys`, also in objects."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import Module

from ._tuples import AssignableTuple, rebuild

_OPAQUE = (Module, type, str, bytes, torch.dtype, torch.device, torch.Generator)
_Objects = dict[int, tuple[Any, Any]]  # those met so far, by id, with what stands for them


def leaves_of(value: Any) -> dict[str, torch.Tensor]:
    """The tensors in nested containers and objects (caches), by where they are; an object is looked into once."""
    return {"": value} if isinstance(value, torch.Tensor) else dict(_walk(value, "", {}))


def map_leaves(function: Callable[[str, torch.Tensor], Any], value: Any, *, in_objects: bool = True) -> Any:
    """`value` with `function` applied to its leaves, in containers of the same classes and copies of the objects."""
    return _map(function, value, "", {} if in_objects else None)


def objects_in(value: Any) -> list[Any]:
    """The objects in nested containers whose attributes may hold tensors."""
    items = _items(value)
    if items is None:
        return [value] if _is_object(value) and not isinstance(value, torch.Tensor) else []
    return [found for _, item in items for found in objects_in(item)]


def restore(new: Any, old: Any, leaves: Mapping[str, torch.Tensor]) -> Any:
    """Containers as in `new` with these leaves in them; objects are those of `old`, which get theirs as attributes."""
    return _restore(new, old, leaves, "")


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, tuple):
        return list(enumerate(tuple.__iter__(value)))
    return list(enumerate(value)) if isinstance(value, list) else None


def _is_object(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, _OPAQUE) and not callable(value)


def _walk(value: Any, at: str, objects: _Objects) -> Iterator[tuple[str, torch.Tensor]]:
    items = _items(value)
    if items is None and _is_object(value) and id(value) not in objects:
        objects[id(value)] = (value, None)
        items = list(vars(value).items())
    for key, item in items or ():
        if isinstance(item, torch.Tensor):
            yield f"{at}.{key}", item
        else:
            yield from _walk(item, f"{at}.{key}", objects)


def _map(function: Callable[[str, torch.Tensor], Any], value: Any, at: str, objects: _Objects | None) -> Any:
    if isinstance(value, torch.Tensor):
        return function(at, value)
    items = _items(value)
    if items is not None:
        return _rebuilt(value, [(key, _map(function, item, f"{at}.{key}", objects)) for key, item in items])
    if objects is None or not _is_object(value):
        return value
    if id(value) not in objects:
        twin = object.__new__(type(value)) if leaves_of(value) else value
        objects[id(value)] = (value, twin)
        if twin is not value:
            vars(twin).update({n: _map(function, item, f"{at}.{n}", objects) for n, item in vars(value).items()})
    return objects[id(value)][1]


def _rebuilt(value: Any, items: list[tuple[Any, Any]]) -> Any:
    if isinstance(value, dict):
        mapped = copy.copy(value)
        for key, item in items:
            mapped[key] = item
        return mapped
    kind = value.native if isinstance(value, AssignableTuple) else type(value)
    return rebuild(kind, [item for _, item in items]) if isinstance(value, tuple) else [item for _, item in items]


def _restore(new: Any, old: Any, leaves: Mapping[str, torch.Tensor], at: str) -> Any:
    if isinstance(new, torch.Tensor):
        return leaves[at]
    items = _items(new)
    if items is not None:
        return _rebuilt(new, [(key, _restore(item, _child(old, key), leaves, f"{at}.{key}")) for key, item in items])
    if type(new) is not type(old) or not _is_object(old):
        return new
    for name, item in vars(old).items():
        inside = leaves_of([item])
        if any(leaves.get(f"{at}.{name}{where[2:]}", leaf) is not leaf for where, leaf in inside.items()):
            vars(old)[name] = _restore(vars(new)[name], item, leaves, f"{at}.{name}")
    return old


def _child(old: Any, key: Any) -> Any:
    if isinstance(old, dict):
        return old.get(key)
    return old[key] if isinstance(old, (tuple, list)) and key < len(old) else None
