"""Recorders: told about every call of a place, without a worker that stands still there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Recorder(Protocol):
    """Belongs to one place; its methods are called in the model's coroutine, `index` counts the place's calls."""

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        """The place is called with these arguments, all edits of them included."""
        ...

    def end(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int, step: int) -> None:
        """The call is over, and the model goes on with `result`; `begin` was missed where it had begun before.

        `step` is below 0 before the first step has begun.
        """
        ...


class Recording(Protocol):
    """Recorders that belong together, by place."""

    @property
    def takes_inputs(self) -> bool:
        """Whether `begin` is to be called."""
        ...

    @property
    def recorders(self) -> Mapping[Any, Recorder]: ...

    def finish(self) -> None:
        """The run went well, and every value is still there."""
        ...

    def close(self) -> None:
        """The run is over: let go of it."""
        ...
