"""Make training batches: single sentences, runs of sentences, and repeated random tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

IGNORED = -100  # the label that the model's loss skips
WIDTHS = (64, 96, 128, 256)


@dataclass
class Batches:
    """Draw batches of `(input_ids, labels)`, both `[batch, seq]`, from shuffled sentences."""

    tokenizer: PreTrainedTokenizerFast
    sentences: list[str]
    rng: random.Random
    singles: int = 64
    long_tokens: int = 1024
    repeated_share: float = 0.12
    _order: Iterator[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._order = self._endless()
        self._end = int(self.tokenizer.eos_token_id)
        self._ids = {text: self.tokenizer.encode(text) for line in set(self.sentences) for text in (line, " " + line)}

    def single_sentences(self) -> tuple[Tensor, Tensor]:
        """Sentences that each start at position 0, mostly without the end token before them."""
        rows = [[*self._ids[next(self._order)], self._end] for _ in range(self.singles)]
        rows = [[self._end, *row] if self.rng.random() < 0.2 else row for row in rows]
        return self._padded(rows, [0] * len(rows))

    def long_rows(self) -> tuple[Tensor, Tensor]:
        """Runs of sentences and repeated random tokens, of one width."""
        width = self.rng.choice(WIDTHS)
        rows, skips = [], []
        for _ in range(self.long_tokens // width):
            repeated = self.rng.random() < self.repeated_share
            row, skip = self.repeated_row(width) if repeated else (self._run_row(width), 0)
            rows.append(row)
            skips.append(skip)
        return self._padded(rows, skips)

    def repeated_row(self, width: int) -> tuple[list[int], int]:
        """Random tokens said again up to the width, and how many of them come first."""
        length = self.rng.randint(4, min(40, width // 2))
        block = [self.rng.randrange(len(self.tokenizer)) for _ in range(length)]
        return (block * (width // length + 1))[:width], length

    def _run_row(self, width: int) -> list[int]:
        row = [self._end] if self.rng.random() < 0.5 else self._ids[next(self._order)][:]
        while len(row) < width:
            joined = bool(row) and row[-1] != self._end and self.rng.random() < 0.5
            line = next(self._order)
            if joined:
                row += self._ids[" " + line]
                continue
            row += ([] if row[-1] == self._end else [self._end]) + self._ids[line]
        return row[:width]

    def _padded(self, rows: list[list[int]], skips: list[int]) -> tuple[Tensor, Tensor]:
        """Pad on the right; the labels skip the padding and each row's first tokens."""
        width = max(map(len, rows))
        inputs = torch.full((len(rows), width), self._end)
        labels = torch.full((len(rows), width), IGNORED)
        for i, (row, skip) in enumerate(zip(rows, skips, strict=True)):
            inputs[i, : len(row)] = torch.tensor(row)
            labels[i, skip : len(row)] = inputs[i, skip : len(row)]
        return inputs, labels

    def _endless(self) -> Iterator[str]:
        while True:
            yield from self.rng.sample(self.sentences, len(self.sentences))
