"""Lanes: one request of the engine each, with the block that sees its tokens.

A block runs as in any trace, with a pass of its own.  The model's side of that pass is not a coroutine: it is the
engine's worker, which calls the model for many requests at once and visits each lane with its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from greenlet import getcurrent
from torch.nn import Module

from .._core import RESULT, Coroutine, Pass, capture_modes, switch_modes
from ..errors import NNsightError

if TYPE_CHECKING:
    from .._core import Run
    from ..trace import Given
    from ._compiled import Compiled
    from ._messages import Ask


# Makes the lanes of the job whose code runs.
lane_maker: ContextVar[Callable[[Given], Lane]] = ContextVar("nnsight_lane_maker")


class Lane:
    """One request; as the call of a run, it is what the run executes.

    `start` and `stop` are its rows in the engine's batch while it takes part in the current step, `row` its number there.
    """

    def __init__(self, ask: Ask, hand_in: Callable[[Lane], None], take_turn: Callable[[], None]) -> None:
        self.ask = ask
        self.result: Any = None
        self.run: Run | None = None
        self.spec: Compiled | None = None  # what stands for the edits of the model, where no block sees the values
        self.edits: Sequence[Any] = ()  # those edits
        self.attended = True
        self.steps = 0  # that there were, once it is over
        self._main: LanePass | None = None
        self.length = self.computed = 0  # tokens of the prompt, and those that the model has seen
        self.start = self.stop = self.row = 0
        self._over = self._waited_for = False
        self._hand_in = hand_in
        self._take_turn = take_turn  # before the block goes on, beside others
        self._driver: Coroutine | None = None

    def __call__(self) -> Any:
        """In the block's coroutine: run the request for a block that asks for nothing of it."""
        self.enter()
        while not self._over:
            self.wait()
        return self.result

    def enter(self) -> None:
        """In the block's coroutine: hand the request in."""
        current = getcurrent()
        assert isinstance(current, Coroutine)
        self._driver = current
        spec = self.spec
        if spec is not None:
            self.attended = self.ask.attended = self._is_attended()
            if not self.attended:
                self.ask.salt, self.ask.by_length = spec.salt, spec.by_length
        self._hand_in(self)

    def _is_attended(self) -> bool:
        assert self.run is not None
        waiting = any(w.coroutine is not None and w.request is None and not w.finished for w in self.run.workers)
        return waiting or (self._main is not None and self._main.is_attended())

    def add_edits(self) -> None:
        """In the block's coroutine: a block sees the values, so the edits act on them in its own run, before it."""
        assert self.run is not None
        workers = self.run.workers
        blocks = list(workers)
        for edit in self.edits:
            edit.add_to(self.run)
        workers[:] = [*workers[len(blocks) :], *blocks]

    def wait(self) -> None:
        """In the block's coroutine: let the engine go on until it has something for this lane."""
        self._waited_for = True
        try:
            hand_over()
        finally:
            self._waited_for = False

    def finish(self, result: Any) -> None:
        """The engine has done the request: let the block go on to its end."""
        self._over, self.result = True, result
        with self.visiting():
            if self.lives:
                if not self.attended:
                    self.main.pass_unseen(self.steps)
                self.main.finish(result)
            if self._driver and self._waited_for:
                self._driver.resume()

    def fail(self, error: NNsightError) -> None:
        """End the block with an error where it stands."""
        self._over = True
        if self._main is not None:
            self._main.done = True
        if self._driver and self._waited_for:
            with self.visiting():
                self._driver.throw(error)

    def leave(self, values: Iterable[torch.Tensor], path: str) -> None:
        """The engine goes on from values that the block was given: changes in place reach nothing from here on."""
        if self.run is not None:
            self.run.edits.note_passed([(value, path) for value in values])

    @property
    def lives(self) -> bool:
        """Whether the block still takes part."""
        return self._main is not None and not self._main.done

    @property
    def main(self) -> LanePass:
        """The pass of the block, once that has asked for something."""
        assert self._main is not None
        return self._main

    def begin(self, main: LanePass) -> None:
        """In the block's coroutine: `main` is what runs it."""
        self._main = main

    @contextmanager
    def visiting(self) -> Iterator[None]:
        """The block runs in here, in modes of its own, and comes back when it waits or ends."""
        modes = capture_modes()
        self._take_turn()
        if self._driver:
            self._driver.parent = getcurrent()
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            switch_modes(capture_modes(), modes)


def hand_over() -> None:
    """Let whoever resumed the current coroutine go on; it goes on in its own modes."""
    current, modes = getcurrent(), capture_modes()
    assert isinstance(current, Coroutine)
    current.hand_over()
    switch_modes(capture_modes(), modes)


class LanePass(Pass):
    """A pass whose model is run by the engine."""

    _entered = False

    def advance(self) -> None:
        """Let the engine go on until it visits this lane, or the request is over."""
        lane: Lane = self._call.function  # pyright: ignore[reportFunctionMemberAccess]
        self._driver = getcurrent()
        if not self._entered:
            self._entered = True
            lane.begin(self)
            if self._begin is not None:
                self._begin()
            if lane.edits and self.is_attended():
                lane.add_edits()
                assert self._begin is not None
                self._begin()
            lane.enter()
        if not self.done:
            lane.wait()

    def is_attended(self) -> bool:
        """Whether somebody waits for more than the result."""
        wanted = self.wanted_outputs.keys() - {RESULT}
        return bool(wanted or self.wanted_inputs or self.recorders or self.input_recorders)

    def pass_unseen(self, steps: int) -> None:
        """Every module has run in the steps of a request that was not attended."""
        self.step = steps - 1
        self.counts.update(dict.fromkeys(self._instruments.modules(), steps))

    def finish(self, result: Any) -> None:
        """No other step comes."""
        self.touch(RESULT, result)
        self.done = True
        self.here = None

    def close(self) -> None:
        """Take no part any more."""
        self.done = True
        super().close()

    def watch(self, module: Module) -> None:
        """Every call is counted."""

    def is_ahead(self, place: Any) -> bool:
        """Never served by the shorter way."""
        return False
