"""Scoring: what a runner makes of the model's output."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Scoring(Protocol):
    """Numbers for each row of a batch, from the model's output.

    `keep` is how many positions from the end it looks at, None: all; `whole` whether it is to be given all prompts at once,
    in order.
    """

    @property
    def keep(self) -> int | None: ...

    @property
    def whole(self) -> bool: ...

    def learn(self, logits: torch.Tensor, prompts: torch.Tensor) -> None:
        """See the logits `[row, pos, vocab]` of these prompts in the plain run, before they are scored."""
        ...

    def __call__(self, output: Any, prompts: torch.Tensor) -> torch.Tensor:
        """The numbers `[row, …]` of rows with these prompts."""
        ...


class NoScore:
    """Where only values are read."""

    keep, whole = 1, False

    def learn(self, logits: torch.Tensor, prompts: torch.Tensor) -> None:
        """Nothing to compare with."""

    def __call__(self, output: Any, prompts: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        return torch.zeros(len(prompts))
