"""Prompts: the inputs of an experiment as rows of token ids, and the labels of their positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nnsight import LanguageModel, errors


class Prompts:
    """Rows of token ids, which a trace pads on the left where their lengths differ.

    Args:
        rows: Token ids `[seq]` of each prompt.
        tokens: The same as strings.
        single: Whether the user gave one prompt, not a batch of one.
    """

    def __init__(self, rows: Sequence[torch.Tensor], tokens: Sequence[Sequence[str]], single: bool) -> None:
        self.rows = tuple(rows)
        self.tokens = tuple(map(tuple, tokens))
        self.single = single
        self.length = max(len(row) for row in self.rows)
        self.padded = any(len(row) != self.length for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: Iterable[int]) -> Prompts:
        """The prompts of these numbers, as a batch of their own."""
        chosen = list(rows)
        return Prompts([self.rows[i] for i in chosen], [self.tokens[i] for i in chosen], single=False)

    def inputs(self, rows: Iterable[int] | None = None) -> Any:
        """What to give a trace, for all prompts or for those of the numbers in `rows` (as often as they stand there)."""
        chosen = self.rows if rows is None else [self.rows[i] for i in rows]
        if not self.padded:
            return torch.stack(list(chosen))
        # Rows of the longest prompt's length, whichever are chosen: positions mean the same in every batch.
        ids = torch.zeros(len(chosen), self.length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(chosen):
            ids[i, self.length - len(row) :] = row
            mask[i, self.length - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def real(self) -> torch.Tensor:
        """Which positions are tokens of the prompt, not padding: `[prompt, pos]`."""
        counts = torch.tensor([len(row) for row in self.rows])
        return torch.arange(self.length) >= (self.length - counts)[:, None]

    def labels(self) -> tuple[str | int, ...]:
        """A label for each position: its token where all prompts have the same, else its number."""
        if self.padded:
            return tuple(range(-self.length, 0))
        columns = [{tokens[i] for tokens in self.tokens} for i in range(self.length)]
        found = [column.pop() if len(column) == 1 else i for i, column in enumerate(columns)]
        return tuple(found)


def encode(model: LanguageModel, value: Any) -> Prompts:
    """Prompts from a text, a list of texts, token ids (a list, `[seq]` or `[batch, seq]`), or a list of any of these.

    Raises:
        InputError: `value` is none of these, or empty, or text for a model without a tokenizer.
    """
    if isinstance(value, Prompts):
        return value
    single = isinstance(value, str) or _is_ids(value)
    values = [value] if single else list(value)
    rows = [_encode_one(model, one) for one in values]
    if not rows or not all(len(row) for row in rows):
        raise errors.InputError("An experiment needs prompts, with at least one token each.")
    tokenizer = _tokenizer(model)
    tokens = [[str(int(i)) if tokenizer is None else tokenizer.decode([int(i)]) for i in row] for row in rows]
    return Prompts(rows, tokens, single)


def encode_pair(model: LanguageModel, clean: Any, corrupted: Any) -> tuple[Prompts, Prompts]:
    """Two batches of prompts that stand opposite each other, token by token.

    Raises:
        InputError: There are not as many of the one as of the other, or two that belong together differ in length.
    """
    first, second = encode(model, clean), encode(model, corrupted)
    if len(first) != len(second):
        raise errors.InputError(f"{len(first)} clean prompts do not pair with {len(second)} corrupted ones.")
    for i, (one, other) in enumerate(zip(first.tokens, second.tokens, strict=True)):
        if len(one) != len(other):
            raise errors.InputError(_LENGTHS.format(i=i, one=list(one), other=list(other), n=len(one), m=len(other)))
    return first, second


def pair_labels(first: Prompts, second: Prompts) -> tuple[str | int, ...]:
    """A label for each position of a pair: both tokens where they differ in the same way in every pair."""
    pairs = zip(first.labels(), second.labels(), strict=True)
    return tuple(one if one == other or isinstance(one, int) else f"{one}/{other}" for one, other in pairs)


def token_id(model: LanguageModel, answer: str | int) -> int:
    """The id of an answer that is one token.

    Raises:
        InputError: The text is more than one token, or the model has no tokenizer.
    """
    if isinstance(answer, int):
        return answer
    tokenizer = _tokenizer(model)
    if tokenizer is None:
        raise errors.InputError(f"This model has no tokenizer: give {answer!r} as a token id.")
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if len(ids) != 1:
        raise errors.InputError(_TOKENS.format(answer=answer, pieces=[tokenizer.decode([i]) for i in ids]))
    if ids[0] == getattr(tokenizer, "unk_token_id", None):
        raise errors.InputError(f"The tokenizer does not know {answer!r}.")
    return ids[0]


def _is_ids(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 1
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(one, int) for one in value)


def _encode_one(model: LanguageModel, value: Any) -> torch.Tensor:
    if isinstance(value, str):
        tokenizer = _tokenizer(model)
        if tokenizer is None:
            raise errors.InputError("This model has no tokenizer: give token ids, or LanguageModel(tokenizer=…).")
        return torch.tensor(tokenizer(value)["input_ids"], dtype=torch.long)
    ids = torch.as_tensor(value)
    if ids.dim() != 1 or ids.is_floating_point():
        raise errors.InputError(f"A prompt is text or token ids [seq], not {type(value).__name__}.")
    return ids.long().cpu()


def _tokenizer(model: LanguageModel) -> Any:
    try:
        return model.tokenizer
    except errors.LoadError:
        return None


_LENGTHS = """\
Pair {i} does not line up: the clean prompt has {n} tokens, the corrupted one {m}.
  clean:     {one}
  corrupted: {other}
Patching puts the values at a position of the one at the same position of the other: choose prompts of the same length."""
_TOKENS = """\
The answer {answer!r} is not one token, but {pieces}. Give one token (most begin with a space: " Paris"), or its id."""
