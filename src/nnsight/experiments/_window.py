"""Window: where the positions of the prompts are in the values of each step of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from nnsight import errors


class Cells(NamedTuple):
    """Chosen places of a value, each `[cell]`: the row, the position in the value, and which of the positions it is."""

    rows: torch.Tensor
    places: torch.Tensor
    numbers: torch.Tensor


class Window:
    """What the model sees at a step: `width` positions of `batch` rows, which begin behind what a cache holds.

    Args:
        positions: `"all"`, `"last"`, or positions of the prompts.
        rows: The rows that are meant, None for all.
        key: The place, for messages.
    """

    def __init__(self, positions: str | tuple[int, ...], rows: tuple[int, ...] | None, key: str) -> None:
        self._positions = positions
        self._rows = rows
        self._key = key
        self.batch = self.width = 0
        self._past = self._total = 0
        self._starts = self._ends = torch.zeros(0, dtype=torch.long)
        self._mask: torch.Tensor | None = None

    def move(self, step: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Follow the model to its next step, of which these are the inputs."""
        given = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        given = args[0] if given is None and args else given
        if not isinstance(given, torch.Tensor) or given.dim() < 2:
            raise errors.InputError(
                f"{self._key}: the model's input is no tensor [batch, pos], so it has no positions."
            )
        if kwargs.get("decoder_input_ids") is not None and self._positions != "all":
            raise errors.InputError(f'{self._key}: for an encoder with a decoder, positions="all" is the only choice.')
        self.batch, self.width = given.shape[:2]
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        if mask is not None and self._mask is None and self._positions != "all":
            raise errors.InputError(f"{self._key}: the attention mask is not [batch, pos], so padding cannot be told.")
        if self._mask is not None:
            self._total = self._mask.shape[1]
        else:
            self._total = self.width if step == 0 or self.width > self._total else self._total + self.width
        self._past = self._total - self.width
        if step == 0:
            self._find_prompts()

    def cells(self) -> Cells | None:
        """The chosen places at this step, None for the whole value."""
        if self._positions == "all":
            return None if self._rows is None else self._grid()
        rows = self._chosen_rows()
        if self._positions == "last":
            last = self._real()[1][rows] - 1 - self._past
            return Cells(rows, last, torch.zeros_like(rows))
        wanted = torch.tensor(self._positions)
        starts, ends = self._starts[rows, None], self._ends[rows, None]
        places = torch.where(wanted < 0, ends + wanted, starts + wanted)
        outside = ((places < starts) | (places >= ends)).nonzero()
        if len(outside):
            row, number = outside[0].tolist()
            raise errors.InputError(
                f"{self._key}: row {int(rows[row])} has {int(ends[row] - starts[row])} tokens, and none at position "
                f"{self._positions[number]}."
            )
        places = places - self._past
        here = (places >= 0) & (places < self.width)
        row, number = here.nonzero(as_tuple=True)
        return Cells(rows[row], places[row, number], number)

    def _grid(self) -> Cells:
        rows = self._chosen_rows()
        places = torch.arange(self.width).repeat(len(rows))
        return Cells(rows.repeat_interleave(self.width), places, torch.zeros_like(places))

    def _chosen_rows(self) -> torch.Tensor:
        if self._rows is None:
            return torch.arange(self.batch)
        if max(self._rows) >= self.batch:
            raise errors.InputError(f"{self._key}: the batch has {self.batch} rows; there is no row {max(self._rows)}.")
        return torch.tensor(self._rows)

    def _find_prompts(self) -> None:
        self._starts, self._ends = self._real()

    def _real(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each row's tokens begin and end, `[batch]` each, without its padding."""
        if self._mask is None:
            return torch.zeros(self.batch, dtype=torch.long), torch.full((self.batch,), self._total)
        mask = self._mask.cpu().bool()
        behind = mask.flip(1).int().argmax(1)
        return mask.int().argmax(1), mask.shape[1] - behind
