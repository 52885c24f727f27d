"""Attention with its probabilities, for a layer whose model computes it by a function that has none."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module
from torch.nn.functional import dropout

from ..errors import NamesError


def attend_eagerly(
    show: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`; `show` gives back the probabilities it is to use."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return show(weights, dropout, p=dropout_p, training=dropout_p > 0) @ value


def eager_mask(
    attention: Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    options: dict[str, Any],
) -> torch.Tensor | None:
    """The mask that the eager function needs, from the one that another attention function is given.

    Those are given none where attention is causal or all is allowed, a boolean one `[batch, head, query, key]`, the
    padding `[batch, key]` alone, or a block mask.
    """
    if options.get("cu_seq_lens_q") is not None:
        raise NamesError(_PACKED)
    if mask is not None and not isinstance(mask, torch.Tensor):
        allowed = _from_block_mask(mask, query, key)
    elif mask is not None and mask.dim() == 4:
        if mask.dtype != torch.bool:
            return mask
        allowed = mask
    else:
        allowed = _allowed(attention, query, key, options)
        if mask is not None:
            padding = mask.to(torch.bool)[:, None, None, -key.shape[-2] :]
            allowed = padding if allowed is None else padding & allowed
    if allowed is None:
        return None
    zeros = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
    return zeros.masked_fill(~allowed, torch.finfo(query.dtype).min)


def _allowed(attention: Module, query: torch.Tensor, key: torch.Tensor, options: dict[str, Any]) -> torch.Tensor | None:
    """Which keys each query sees `[1, 1, query, key]` where the function finds that out itself; None: all of them."""
    causal = options.get("is_causal")
    causal = getattr(attention, "is_causal", True) if causal is None else causal
    flash = "flash" in str(getattr(getattr(attention, "config", None), "_attn_implementation", ""))
    window = options.get("sliding_window") if flash else None  # others are given it as a mask
    queries, keys = query.shape[-2], key.shape[-2]
    if window is None and (not causal or queries == 1):
        return None
    # A function without a mask counts queries and keys from the first, flash attention from the last.
    offset = keys - queries if flash else 0
    at = torch.arange(queries, device=query.device)[:, None] + offset
    of = torch.arange(keys, device=query.device)[None]
    allowed = of <= at if causal else torch.ones_like(of <= at)
    if window is not None:
        allowed = allowed & ((at - of).abs() < window)
    return allowed[None, None]


def _from_block_mask(mask: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    create_mask = getattr(sys.modules[type(mask).__module__], "create_mask", None)
    if create_mask is None or not callable(getattr(mask, "mask_mod", None)):
        raise NamesError(f"An attention mask of type {type(mask).__name__} cannot be used to compute the pattern.")
    batch, heads = query.shape[:2]
    return create_mask(mask.mask_mod, batch, heads, query.shape[-2], key.shape[-2], device=str(query.device))


_PACKED = """\
The pattern of sequences packed into one row is not known to the vocabulary: give each its own row of the batch."""
