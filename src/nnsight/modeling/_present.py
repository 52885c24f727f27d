"""How values of a Hugging Face model are shown: block outputs and the root's output in every spelling."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from ..envoy import present_plainly
from ..errors import EditError
from ._hidden import beside_hidden, returns_tuple, show_block_output, take_block_output
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
    kind = type(module)
    native = returns_tuple(kind) if is_block(module) else None
    if native is None:
        return value
    beside = beside_hidden(kind) if native and isinstance(value, torch.Tensor) else ()
    if not all(_UNUSED.search(name) for name in beside):
        returned = ", ".join(("hidden_states", *beside))
        raise EditError(_BESIDE.format(kind=kind.__name__, returned=returned))
    return take_block_output((None, *(None for _ in beside)) if native else _NO_TENSOR, value)


_NO_TENSOR = torch.empty(0)
_UNUSED = re.compile("attn_weights|attentions?$|att_matrix|^None$")  # nothing of the model's is computed with these

_BESIDE = """\
{kind} returns ({returned}), and the layers that follow use all of it: skip it with the whole, \
.skip((hidden, ...)), where the rest may be that of an earlier layer, .output[1]."""
