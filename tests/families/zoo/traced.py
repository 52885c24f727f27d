"""Families under nnsight: wrapping them, giving them inputs, and reading what the oracle recorded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Module

from nnsight import LanguageModel, NNsight, TransformersModel, VisionLanguageModel

from ._family import Family, Inputs
from .plain import Event, Leaves, copies_of

Given = tuple[tuple[Any, ...], dict[str, Any]]


CLASSES = {"decoder": LanguageModel, "vision-language": VisionLanguageModel}


def wrap(family: Family, module: Module) -> NNsight:
    return CLASSES.get(family.kind, TransformersModel)(module)


def given(family: Family, inputs: Inputs) -> Given:
    """The arguments of `trace` or `invoke` that stand for keyword inputs of the forward."""
    if not family.takes_text:
        return (), dict(inputs)
    names = ("input_ids", "attention_mask")
    return ({name: inputs[name] for name in names},), {n: v for n, v in inputs.items() if n not in names}


def envoy(model: NNsight, path: str) -> Any:
    return model.get(path) if path else model


def read(model: NNsight, path: str, kind: str) -> Any:
    place = envoy(model, path)
    return place.output if kind == "output" else place.inputs


def shown(value: Any, native: type) -> Leaves:
    """The leaves of a value as nnsight shows it, named as in the value that the module returned."""
    if isinstance(value, torch.Tensor) and issubclass(native, tuple):
        value = tuple(value)  # a block's output, which answers as a tensor and as a tuple
    return copies_of(value)


def first_calls(events: Iterable[Event]) -> list[Event]:
    """The first call of each module, in the order in which it happened."""
    return [event for event in events if event.call == 0]


def own_part(batched: torch.Tensor, single: torch.Tensor, *, left: bool) -> torch.Tensor:
    """The part of a padded row that belongs to the prompt, in the dimensions where it is longer than alone."""
    for dim, length in enumerate(single.shape):
        surplus = batched.shape[dim] - length
        if surplus > 0:
            batched = batched.narrow(dim, surplus if left else 0, length)
    return batched


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
