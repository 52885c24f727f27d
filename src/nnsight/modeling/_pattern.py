"""Attention patterns at the dropout behind the softmax, on releases that do not call that module any more.

Documents written for older `transformers` read `attn.attn_dropout.input`: the attention probabilities of a
layer.  Where such a read is made, that layer computes its attention eagerly, by the model's own eager function,
and the probabilities appear at the dropout's place, readable and writable.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import Dropout, Module

from .._core import Worker, current_pass
from ..source import intercept

_INTERFACE = "attention_interface_0"
_DROPOUT = "nn_functional_dropout_0"
_MASK = 4  # position of the mask among the arguments of an attention function


class PatternOnDemand:
    """Called before each request: makes a layer compute eagerly when its pattern is asked for."""

    def __call__(self, worker: Worker, module: Module, path: str) -> None:
        if type(module) is not Dropout or not path.endswith("attn_dropout"):
            return
        run = worker.run
        attention = run.instruments.parent(module)
        if attention is None:
            return
        interception = intercept(run.overrides, attention)
        eager = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
        if eager is None or _INTERFACE in interception.redirects:
            return
        interception.redirects[_INTERFACE] = lambda _, args, kwargs: (eager, _with_mask(args), kwargs)
        interception.inside(_INTERFACE).redirects[_DROPOUT] = lambda function, args, kwargs: (
            partial(_call_as, module, function),
            args,
            kwargs,
        )


def _call_as(place: Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    current = current_pass()
    return function(*args, **kwargs) if current is None else current.call(place, function, args, kwargs)


def _with_mask(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an attention function with the mask that eager attention needs.

    Other implementations get none where attention is causal, or a boolean one.
    """
    module, query, key = args[:3]
    mask = args[_MASK]
    if mask is None and getattr(module, "is_causal", True) and query.shape[-2] > 1:
        size, total = query.shape[-2], key.shape[-2]
        mask = torch.ones(size, total, dtype=torch.bool, device=query.device).tril(total - size)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, least)
    return (*args[:_MASK], mask, *args[_MASK + 1 :])
