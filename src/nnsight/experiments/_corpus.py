"""Corpus: prompts as rows of token ids, in windows that are sorted by length and cut into batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from nnsight import errors

Positions = str | Sequence[int] | Callable[[list[int]], Iterable[int]]
_SLACK = 8  # of a batch's tokens, at most one in so many is padding


class Prompt(NamedTuple):
    """One prompt: its number, token ids, and the positions wanted of it."""

    number: int
    ids: list[int]
    chosen: list[int]


def encode_prompts(
    tokenizer: Any, raw: Sequence[Any], start: int, positions: Positions, max_length: int | None
) -> list[Prompt]:
    """Token ids of prompts `start`, `start + 1`, ….

    Raises:
        InputError: One is neither text nor ids, or empty, or has no such position.
    """
    values = [_plain(one, start + i) for i, one in enumerate(raw)]
    texts = [i for i, value in enumerate(values) if isinstance(value, str)]
    if texts:
        if tokenizer is None:
            raise errors.InputError("This model has no tokenizer: give token ids, or LanguageModel(tokenizer=…).")
        for i, ids in zip(texts, tokenizer([values[i] for i in texts])["input_ids"], strict=True):
            values[i] = list(ids)
    prompts = []
    for number, value in enumerate(values, start):
        ids = [int(i) for i in value[:max_length]]
        if not ids:
            raise errors.InputError(f"Prompt {number} has no tokens.")
        prompts.append(Prompt(number, ids, choose(ids, positions, number)))
    return prompts


def choose(ids: list[int], positions: Positions, number: int) -> list[int]:
    """The positions of one prompt, counted from its first token."""
    if isinstance(positions, str):
        return list(range(len(ids))) if positions == "all" else [len(ids) - 1]
    wanted = [int(p) for p in (positions(ids) if callable(positions) else positions)]
    outside = [p for p in wanted if not -len(ids) <= p < len(ids)]
    if outside:
        raise errors.InputError(f"Prompt {number} has {len(ids)} tokens, and none at position {outside[0]}.")
    chosen = [p % len(ids) for p in wanted]
    if len(set(chosen)) < len(chosen):
        raise errors.InputError(f"Prompt {number}: a position is chosen twice, {chosen}.")
    return chosen


def check_positions(positions: Any) -> str:
    """How the manifest writes them.

    Raises:
        InputError: They are of none of the kinds.
    """
    if positions in ("all", "last") if isinstance(positions, str) else False:
        return positions
    if callable(positions):
        return f"function {getattr(positions, '__qualname__', type(positions).__qualname__)}"
    if not isinstance(positions, str) and isinstance(positions, Sequence):
        if positions and all(isinstance(p, int) for p in positions):
            return str(list(positions))
    raise errors.InputError(
        f'positions is "all", "last", a list of whole numbers, or a function from token ids to such a list; not {positions!r}.'
    )


def batches(prompts: Sequence[Prompt], most: int, *, padded: bool) -> Iterator[list[Prompt]]:
    """Batches of about equal length and at most `most` tokens; of exactly equal length unless `padded` is allowed."""
    batch: list[Prompt] = []
    for prompt in sorted(prompts, key=lambda p: (len(p.ids), p.number)):
        if batch:
            shortest, length = len(batch[0].ids), len(prompt.ids)
            longest = shortest + shortest // _SLACK if padded else shortest
            if length > longest or (len(batch) + 1) * length > most:
                yield batch
                batch = []
        batch.append(prompt)
    if batch:
        yield batch


def digest(raw: Iterable[Any]) -> str:
    """A fingerprint of prompts, as they were given."""
    found = hashlib.sha256()
    for one in raw:
        value = _plain(one, 0)
        found.update(b"t" + value.encode() if isinstance(value, str) else b"i" + repr(value).encode())
        found.update(b"\0")
    return found.hexdigest()[:32]


def _plain(value: Any, number: int) -> str | list[int]:
    """Text or token ids of a prompt, or of a row of a dataset."""
    if isinstance(value, Mapping):
        found = next((value[name] for name in ("input_ids", "text") if name in value), None)
        if found is None:
            raise errors.InputError(f"Row {number} of the dataset has neither `input_ids` nor `text`: {list(value)}.")
        value = found
    if isinstance(value, str):
        return value
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, Sequence) and all(isinstance(i, int) for i in value):
        return list(value)
    raise errors.InputError(f"Prompt {number} is text or token ids [seq], not {value!r:.80}.")
