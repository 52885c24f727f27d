"""Check: whether a family's row holds for the model at hand, on a trial forward of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._core import Run

if TYPE_CHECKING:
    from ._stack import Stack
    from ._vocabulary import Vocabulary


def check_stack(names: Vocabulary, stack: Stack, outer: Run) -> dict[str, str]:
    """For each name that does not hold, what was found instead."""
    return {}
