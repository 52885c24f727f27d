"""Ending: when a run is over before its model is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._pass import Pass
    from ._record import Recording, Recordings
    from ._worker import Worker


class Ending:
    """Every block has stopped or is done, and nothing that was to be recorded is still to come.

    Without a block that stops it, only an `early` run ends so.  Lasting edits go as far as the others need.
    """

    def __init__(self, *, early: bool) -> None:
        self._early = self._possible = early
        self._held: list[Recording] = []
        self._awaited: dict[Worker, dict[Any, float]] = {}  # calls to come, of places to be recorded for a worker

    def allow(self) -> None:
        """A block has stopped."""
        self._possible = True

    def has_come(self, workers: Sequence[Worker]) -> bool:
        """Whether nobody needs the model any more."""
        return self._possible and all(
            worker.stopped or ((worker.finished or worker.lasting) and not self._awaited.get(worker))
            for worker in workers
        )

    def hold_for(self, recording: Recording) -> None:
        """An early run does not end before these places were recorded."""
        if self._early:
            self._held.append(recording)
            self._awaited.setdefault(recording.worker, {}).update(dict.fromkeys(recording.recorders, math.inf))

    def attach(
        self, main: Pass, profile: Mapping[Any, int] | None, recordings: Recordings, check: Callable[[], bool]
    ) -> None:
        """Count the calls to come; where their number is not known, the model runs to its end.

        `check` tells in the model's coroutine whether the run is over.
        """
        for recording in self._held:
            awaited = self._awaited[recording.worker]
            for place in recording.recorders:
                if not main.single or profile is None or place not in profile:
                    continue
                awaited[place] = profile[place] - main.counts.get(place, 0)
                if awaited[place] > 0:
                    recordings.follow(place, Countdown(place, awaited, lambda: check() and main.pause()))
                else:
                    del awaited[place]
        self._held.clear()


class Countdown:
    """The recorder that counts a place's calls down."""

    def __init__(self, place: Any, awaited: dict[Any, float], done: Callable[[], object]) -> None:
        self._place = place
        self._awaited = awaited
        self._done = done

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        """Calls count once they are over."""

    def end(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int, step: int) -> None:
        """One call less is to come."""
        left = self._awaited.get(self._place)
        if left is None:
            return
        self._awaited[self._place] = left - 1
        if left <= 1:
            del self._awaited[self._place]
            self._done()
