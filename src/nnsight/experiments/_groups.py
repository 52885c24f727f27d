"""Groups: rows of batches that are edited alike, and what of a live value is theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

Act = Callable[[], Any]
Row = tuple[Any, int]
"""What a row of a batch is for, and the number of its prompt."""


class Part(Protocol):
    """Where the rows that are edited stand in a batch of other rows, or of parts of rows."""

    def unpack(self, live: torch.Tensor) -> torch.Tensor:
        """Their values `[row, pos, …]` in a live value."""
        ...

    def put(self, live: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The live value with these values `[row, pos, …]` of theirs."""
        ...


class Group(NamedTuple):
    """Rows that are run from the same layer.

    `edit` is given what some rows are for, their prompts `[row]` and, where others stand beside them, which part of a live
    value is theirs; it returns what is then called in their trace: that changes something at `layer` or later, `before_mlp`
    of the last layer at the latest.  Rows can be packed where `first` tells, from what a row is for, the first position that
    its edit touches. Rows of other layers can join them where it is known that nothing behind layer `last` is edited.
    """

    rows: Sequence[Row]
    layer: int
    edit: Callable[[Sequence[Any], torch.Tensor, Part | None], Act]
    before_mlp: bool = False
    first: Callable[[Any], int] | None = None
    last: int | None = None
