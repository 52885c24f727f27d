"""Recorders: told about every call of a place, without a worker that stands still there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ._pass import Pass
    from ._worker import Worker


class Recorder(Protocol):
    """Belongs to one place, is called in the model's coroutine; `index` counts the place's calls."""

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        """The place is called with these arguments, all edits of them included."""
        ...

    def end(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int, step: int) -> None:
        """The call is over, and the model goes on with `result`.

        There was no `begin` where the call had begun before; `step` is below 0 before the first step.
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

    @property
    def worker(self) -> Worker:
        """The block it was made in."""
        ...

    def finish(self) -> None:
        """The run went well, and every value is still there."""
        ...

    def close(self) -> None:
        """The run is over: let go of it."""
        ...


class Recordings:
    """Those of one run; also before its forward can start."""

    def __init__(self) -> None:
        self._ends: dict[Any, list[Recorder]] = {}
        self._begins: dict[Any, list[Recorder]] = {}
        self._all: list[Recording] = []
        self._pass: Pass | None = None

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, recording: Recording) -> None:
        """Tell these recorders about every call of their places from now on."""
        self._all.append(recording)
        for place, recorder in recording.recorders.items():
            self._ends.setdefault(place, []).append(recorder)
            if recording.takes_inputs:
                self._begins.setdefault(place, []).append(recorder)

    def follow(self, place: Any, recorder: Recorder) -> None:
        """Tell one more recorder about the calls of a place, after those that are there."""
        self._ends[place].append(recorder)

    def attach(self, main: Pass) -> None:
        """Record what happens in this pass."""
        self._pass = main
        main.recorders, main.input_recorders = self._ends, self._begins
        self._watch(self._ends)

    def _watch(self, places: Iterable[Any]) -> None:
        for place in places:
            if self._pass is not None:
                self._pass.attended.add(place)
                if not place._modules:
                    self._pass.watch(place)

    def finish(self) -> None:
        """The run went well."""
        for recording in self._all:
            recording.finish()

    def close(self) -> None:
        """The run is over."""
        for recording in self._all:
            recording.close()
        self._pass = None
        for held in (self._all, self._ends, self._begins):
            held.clear()
