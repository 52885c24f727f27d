"""Trial runs: forwards on rows of two different inputs, from which a model's layouts are learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ._encodings import Encoded

_LEAST = 4  # tokens: with a single one the orders of rows and tokens could not be told apart


def trial_inputs(part: Encoded, special: Iterable[int], takes_decoder: bool) -> Callable[[list[int]], dict[str, Any]]:
    """Arguments of a forward on the rows with the given numbers: 0 is `part`, 1 the same with other contents.

    Masks, sizes and special tokens stay as they are, so that both run through the same places.
    """
    kept = frozenset(special)
    first = {name: value for name, value in part.values.items() if isinstance(value, torch.Tensor)}
    if first.keys() <= {"input_ids", "attention_mask"}:
        first = {
            name: _lengthened(value, 1 if name == "attention_mask" else _ordinary(kept)[0])
            for name, value in first.items()
        }
    second = {name: _other(name, value, kept) for name, value in first.items()}
    if takes_decoder and "decoder_input_ids" not in first:
        p, q = _ordinary(kept)
        device = next(iter(first.values())).device
        for rows, ids in ((first, [p, q, p]), (second, [q, p, p])):
            rows["decoder_input_ids"] = torch.tensor([ids], device=device).expand(part.rows, -1)

    def inputs(rows: list[int]) -> dict[str, Any]:
        chosen = [(first, second)[row] for row in rows]
        return {name: torch.cat([values[name] for values in chosen]) for name in first}

    return inputs


def special_tokens(tokenizer: Any, *configs: Any) -> Iterator[int]:
    """Ids with a meaning of their own, which a trial leaves where they are."""
    yield from getattr(tokenizer, "all_special_ids", ())
    for config in configs:
        for name, value in (vars(config) if config is not None else {}).items():
            if name.endswith(("_token_id", "_token_index")):
                yield from value if isinstance(value, list) else () if value is None else (value,)


def shortest(parts: Sequence[Encoded]) -> Encoded:
    """The part whose trial runs cost least, a single row where it has several."""
    part = min(parts, key=lambda part: _size(part) if _size(part) >= _LEAST else float("inf"))
    return Encoded(1, {name: v[:1] if _is_rows(v, part.rows) else v for name, v in part.values.items()})


def _size(part: Encoded) -> int:
    sizes = [v.numel() for v in part.values.values() if isinstance(v, torch.Tensor)]
    return max(sizes, default=0) // part.rows


def _is_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows


def _lengthened(value: torch.Tensor, fill: int) -> torch.Tensor:
    missing = max(_LEAST - value.shape[-1], 0)
    return torch.cat([value, value.new_full((*value.shape[:-1], missing), fill)], -1)


def _ordinary(special: frozenset[int]) -> tuple[int, int]:
    found = (i for i in range(len(special) + 2) if i not in special)
    return next(found), next(found)


def _other(name: str, value: torch.Tensor, special: frozenset[int]) -> torch.Tensor:
    if value.is_floating_point():
        return value.flip(-1) * 0.7 + 0.1
    if name not in ("input_ids", "decoder_input_ids"):
        return value
    p, q = _ordinary(special)
    stays = torch.isin(value, torch.tensor(sorted(special), dtype=value.dtype, device=value.device))
    if bool(stays.all()):
        stays = torch.zeros_like(stays)
    return torch.where(stays, value, torch.where(value == p, q, p))
