"""Probes: small inputs like those of a batch, on which the layouts of its values are learnt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from .._core import map_leaves
from ._encodings import Encoded

Value = TypeVar("Value")

_SAMPLES = 4
_LEAST, _MOST = 8, 32  # tokens: a router must have the choice
_ORDINARY = 97
_TEXT = {"input_ids", "attention_mask"}
_MEDIA = ("image", "video", "audio", "vision")
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


def two_steps(generate: Callable[..., Any], generation: dict[str, Any], token: int, pad: int) -> dict[str, Any]:
    """Options of a generation of two steps, both to `token`, whose forwards have the values that `generation` has."""
    known = inspect.signature(generate).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return {name: value for name, value in {**generation, "max_new_tokens": 2}.items() if name in known}
    kept = {name: value for name, value in generation.items() if name in _OF_FORWARD}
    fixed = {"max_new_tokens": 2, "do_sample": False, "num_beams": 1, "eos_token_id": None, "pad_token_id": pad}
    return {**kept, **fixed, "prefix_allowed_tokens_fn": lambda _row, _ids: [token]}


class Sampler:
    """Four different rows of the form of `part`, from which trial forwards are made.

    Masks, sizes and tokens with a meaning of their own stay as they are, so that all of them go through the same places;
    plain text is cut to what a trial needs.  `pad` is the token that pads rows, on the left or the right, or None.
    """

    def __init__(self, part: Encoded, special: Special, vocabulary: int, *, pad: int | None, pad_left: bool) -> None:
        self._special = special
        self._pad_left = pad_left
        usable = range(min(vocabulary, len(special.kept) + _ORDINARY))
        self._ordinary = torch.tensor([i for i in usable if i not in special.kept] or [0])
        self._attached, self.units = part.attached, part.units
        self._size = part.rows if part.attached else 1
        tensors = {name: value for name, value in part.values.items() if isinstance(value, torch.Tensor)}
        if not self._attached:
            tensors = {name: value[:1] if value.shape[:1] == (part.rows,) else value for name, value in tensors.items()}
        if tensors.keys() <= _TEXT:
            tensors = self._cut(tensors)
        self._rows = [self._vary(tensors, row, pad) for row in range(_SAMPLES)]
        self._names = list(self._rows[0])

    def rows(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """The arguments of a forward on these rows; `~2` is row 2 without what is attached."""
        chosen = [self._rows[n] if n >= 0 else self._bare(self._rows[~n]) for n in numbers]
        return {name: torch.cat([row[name] for row in chosen if name in row]) for name in self._names}

    @property
    def token(self) -> int:
        """One without a meaning of its own."""
        return int(self._ordinary[0])

    def decoder_ids(self, numbers: Sequence[int]) -> torch.Tensor:
        """The first tokens of a decoder, for these rows."""
        known = self._ordinary
        ids = [[int(known[(i * (n + 1) + n) % len(known)]) for i in range(3)] for n in (max(n, ~n) for n in numbers)]
        return torch.tensor(ids).repeat_interleave(self._size, 0)

    def _cut(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = tensors["input_ids"][..., :_MOST]
        missing = max(_LEAST - ids.shape[-1], 0)
        more = self._ordinary[torch.arange(missing) % len(self._ordinary)].to(ids).expand(*ids.shape[:-1], -1)
        ids = torch.cat([ids, more], -1)
        return {name: ids if name == "input_ids" else torch.ones_like(ids) for name in tensors}

    def _vary(self, tensors: dict[str, torch.Tensor], row: int, pad: int | None) -> dict[str, torch.Tensor]:
        varied = {name: self._other(name, value, row) for name, value in tensors.items()} if row else tensors
        if pad is None or "input_ids" not in varied:
            return varied
        fills = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0}
        varied = {"attention_mask": torch.ones_like(varied["input_ids"]), **varied}
        return {n: self._padded(v, fills[n], row, n) if n in fills else v for n, v in varied.items()}

    def _padded(self, value: torch.Tensor, fill: int, row: int, name: str) -> torch.Tensor:
        # All rows get as many tokens more, of which so many are padding.
        shape = (*value.shape[:-1], row + 1)
        real = value[..., :1].expand(*value.shape[:-1], _SAMPLES - row) if name == "attention_mask" else None
        if real is None:
            ordinary = int(self._ordinary[0]) if name == "input_ids" else 0
            real = value.new_full((*value.shape[:-1], _SAMPLES - row), ordinary)
        padding = value.new_full(shape, fill)
        return torch.cat([padding, real, value] if self._pad_left else [value, real, padding], -1)

    def _other(self, name: str, value: torch.Tensor, row: int) -> torch.Tensor:
        if value.is_floating_point():
            return value.roll(row, -1) * (1 - 0.15 * row) + 0.1 * row
        if name not in ("input_ids", "decoder_input_ids"):
            return value
        steps = torch.arange(1, value.shape[-1] + 1, device=value.device) * (row + 1) + row
        others = self._ordinary.to(value)[steps % len(self._ordinary)].expand(value.shape)
        kept = torch.isin(value, torch.tensor(sorted(self._special.kept), dtype=value.dtype, device=value.device))
        return torch.where(kept & ~kept.all(), value, others)

    def _bare(self, row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {name: value for name, value in row.items() if name not in self._attached}
        ids = bare["input_ids"]
        media = torch.isin(ids, torch.tensor(sorted(self._special.media), dtype=ids.dtype, device=ids.device))
        bare["input_ids"] = torch.where(media, self._ordinary[0].to(ids), ids)
        return {n: torch.zeros_like(v) if n == "mm_token_type_ids" else v for n, v in bare.items()}


class Special(NamedTuple):
    """Token ids that a trial leaves where they are; `media` of them stand for what is attached."""

    kept: frozenset[int]
    media: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, *configs: Any) -> Special:
        """Those that a tokenizer and configs name."""
        kept, media = set(getattr(tokenizer, "all_special_ids", ())), set()
        for config in configs:
            for name, value in (vars(config) if config is not None else {}).items():
                if name.endswith(("_token_id", "_token_index")):
                    ids = {i for i in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(i, int)}
                    kept |= ids
                    media |= ids if name.startswith(_MEDIA) else set()
        return cls(frozenset(kept), frozenset(media))
