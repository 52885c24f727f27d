"""Projections: the output of a linear map as the sum of what each head adds, and the bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Linear, Module, Parameter

from .._core import uncounted


def split_projection(
    projection: Module, plain: Callable[..., Any], mixed: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The heads' results `[batch, pos, head, d_model]`, and the bias.

    Where the weight is not at hand (quantised, adapted), `plain`, the projection's forward, is applied to each head alone.
    """
    by_head = mixed.unflatten(-1, (heads, -1))
    weight = _plain_weight(projection, mixed)
    if weight is not None:
        results = torch.einsum("...hd,hde->...he", by_head, weight.unflatten(0, (heads, -1)))
        return results, projection._parameters.get("bias")
    with uncounted():
        bias = plain(torch.zeros_like(mixed))
        alone = [_only(by_head, head).flatten(-2) for head in range(heads)]
        return torch.stack([plain(one) - bias for one in alone], -2), bias


def _only(by_head: torch.Tensor, head: int) -> torch.Tensor:
    mask = torch.zeros(by_head.shape[-2], 1, dtype=by_head.dtype, device=by_head.device)
    mask[head] = 1
    return by_head * mask


def _plain_weight(projection: Module, mixed: torch.Tensor) -> torch.Tensor | None:
    """The weight `[in, out]` of a linear map that is nothing more."""
    weight = projection._parameters.get("weight")
    if type(weight) is not Parameter or weight.dim() != 2 or weight.dtype != mixed.dtype or weight.is_meta:
        return None
    if type(projection).forward is Linear.forward or type(projection).__name__ == "FalconLinear":
        return weight.T
    return weight if type(projection).__name__ == "Conv1D" else None
