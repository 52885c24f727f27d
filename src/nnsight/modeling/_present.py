"""How values of a Hugging Face model are shown: block outputs and the root's output in every spelling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from ..envoy import present_plainly
from ._hidden import returns_tuple, show_block_output, take_block_output
from ._outputs import show_causal_output


class Presenter:
    """Shows block outputs and the model's output in every spelling."""

    def __init__(self, root: Module) -> None:
        self._root = root

    def __call__(self, module: Module, value: Any, write: Callable[[Any], None]) -> Any:
        if is_block(module):
            return show_block_output(value, write)
        if module is self._root:
            return show_causal_output(value)
        return present_plainly(module, value, write)


def is_block(module: Module) -> bool:
    """Whether `module` is a decoder or encoder block of a Hugging Face model."""
    return _is_block_class(type(module))


@functools.cache
def _is_block_class(kind: type) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return issubclass(kind, GradientCheckpointingLayer)


def accept(module: Module, current: Any, assigned: Any) -> Any:
    """What the model gets when `assigned` is put at a module's output."""
    return take_block_output(current, assigned) if is_block(module) else assigned


def stand_in(module: Module, value: Any) -> Any:
    """What a skipped module returns when a block says it is `value`."""
    native = returns_tuple(type(module)) if is_block(module) else None
    return value if native is None else take_block_output((None,) if native else _NO_TENSOR, value)


_NO_TENSOR = torch.empty(0)
