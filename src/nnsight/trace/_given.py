"""What a trace is given: its inputs, and the call a model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .._core import Call


class Given(NamedTuple):
    """The inputs of the trace itself, or of one invoke."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Prepared(NamedTuple):
    """The call for all inputs of a trace, and how many rows of the batch each of them has.

    `attached` tells by name how much each has of what is attached to rows without being one: images, patches.
    """

    call: Call
    sizes: Sequence[int]
    attached: Sequence[Mapping[str, int]] = ()


Prepare = Callable[[list[Given]], Prepared]
