"""The tensors inside nested values: listing, mapping, and seeing that they changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ._tuples import AssignableTuple, rebuild

Snapshot = list[tuple[torch.Tensor, int]]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def constants_in(value: Any) -> list[Any]:
    """Everything but the tensors in nested tuples, lists and mappings, keys included."""
    if isinstance(value, torch.Tensor):
        return []
    if isinstance(value, dict):
        return [*value, *(constant for item in value.values() for constant in constants_in(item))]
    if isinstance(value, (tuple, list)):
        return [constant for item in value for constant in constants_in(item)]
    return [value]


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """`value` with `function` applied to its tensors, in containers of the same classes."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, AssignableTuple):
        return rebuild(value.native, [map_tensors(function, item) for item in value])
    if isinstance(value, tuple):
        return rebuild(type(value), [map_tensors(function, item) for item in value])
    if isinstance(value, list):
        return [map_tensors(function, item) for item in value]
    if isinstance(value, dict):
        mapped = copy.copy(value)
        for key, item in value.items():
            mapped[key] = map_tensors(function, item)
        return mapped
    return value


def snapshot(value: Any) -> Snapshot | None:
    """Which tensors `value` holds, at which versions; None where PyTorch keeps no versions."""
    try:
        return [(tensor, tensor._version) for tensor in tensors_in(value)]
    except RuntimeError:  # an inference tensor
        return None


def holds_others(value: Any, before: Snapshot) -> bool:
    """Whether `value` holds other tensors than before."""
    now = tensors_in(value)
    return len(now) != len(before) or any(a is not b for a, (b, _) in zip(now, before, strict=True))


def has_changed(value: Any, before: Snapshot) -> bool:
    """Whether a tensor in `value` was changed in place, or exchanged, since `before`."""
    now = tensors_in(value)
    return len(now) != len(before) or any(
        tensor is not old or tensor._version != version for tensor, (old, version) in zip(now, before, strict=True)
    )


class Mark(NamedTuple):
    """A tensor, and what tells whether it was changed in place since; inference tensors have no version."""

    tensor: torch.Tensor
    version: int
    copy: torch.Tensor | None


def mark(tensor: torch.Tensor) -> Mark:
    """`tensor` as it is now."""
    return Mark(tensor, 0, tensor.clone()) if tensor.is_inference() else Mark(tensor, tensor._version, None)


def are_changed(marks: list[Mark]) -> bool:
    """Whether any of these tensors was changed in place."""
    return any(_is_changed(*entry) for entry in marks)


def _is_changed(tensor: torch.Tensor, version: int, copy: torch.Tensor | None) -> bool:
    if copy is None:
        return tensor._version != version
    if isinstance(tensor, FakeTensor):
        return False
    return not bool(((tensor == copy) | ((tensor != tensor) & (copy != copy))).all())
