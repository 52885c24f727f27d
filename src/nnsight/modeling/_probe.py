"""Probes: small inputs like those of a batch, on which the layouts of its values are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from .._core import map_leaves
from ._text import positions

Value = TypeVar("Value")

_SAMPLES = 4
_LEAST = 8  # tokens: a router must have the choice
_OF_FORWARD = frozenset({"use_cache", "output_attentions", "output_hidden_states", "output_router_logits"})


def choose_rows(sizes: Sequence[int]) -> list[int]:
    """The numbers of four rows of a batch, of different invokes if there are so many, else some twice."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    others = [row for row in range(sum(sizes)) if row not in starts]
    rows = [*starts, *others]
    return [rows[i % len(rows)] for i in range(_SAMPLES)]


def select_rows(value: Value, rows: Sequence[int], total: int) -> Value:
    """The same arguments with the batch made of `rows`; a tensor whose first dimension is not `total` stays as it is."""

    def select(_: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] != total:
            return tensor
        return tensor.detach().index_select(0, torch.tensor(rows, device=tensor.device))

    return map_leaves(select, value)


def two_steps(generation: dict[str, Any], token: int) -> dict[str, Any]:
    """Options of a generation of two steps whose forwards have the same values as those of `generation`."""
    kept = {name: value for name, value in generation.items() if name in _OF_FORWARD}
    fixed = {"max_new_tokens": 2, "do_sample": False, "num_beams": 1, "eos_token_id": None, "pad_token_id": token}
    return {**kept, **fixed, "prefix_allowed_tokens_fn": lambda _row, _ids: [token]}


def sample_tokens(batch: dict[str, torch.Tensor], vocabulary: int, *, pad_left: bool) -> dict[str, torch.Tensor]:
    """Four different rows of the form of a batch of token ids, padded if that is, of some length at least."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    length = max(ids.shape[1], _LEAST)
    first = ids[:1].repeat(1, -(-length // ids.shape[1]))[:, :length]
    step = torch.arange(_SAMPLES, device=ids.device)[:, None]
    samples = {"input_ids": (first + step * torch.arange(1, length + 1, device=ids.device)) % vocabulary}
    kept = torch.ones_like(samples["input_ids"])
    if mask.is_meta or not mask.all():
        place = torch.arange(length, device=ids.device)[None]
        kept = (place > step if pad_left else place < length - 1 - step).long()
    samples["attention_mask"] = kept
    if "position_ids" in batch:
        samples["position_ids"] = positions(kept)
    return samples
