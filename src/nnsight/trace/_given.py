"""What a trace is given: its inputs, and the call a model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .._core import Call


class Given(NamedTuple):
    """The inputs of the trace itself, or of one invoke."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Prepared(NamedTuple):
    """The call for all inputs of a trace, and how many rows of the batch each of them has."""

    call: Call
    sizes: Sequence[int]


Prepare = Callable[[list[Given]], Prepared]
