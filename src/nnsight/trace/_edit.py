"""Edits: blocks that run in every later trace of a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .._capture import Block, Scope, bind, capture, is_skip, skip_body
from .._core import Request, Run, Worker
from ..errors import CaptureError, OrderError
from ._steps import reach_step

if TYPE_CHECKING:
    from ..envoy import Envoy


class Edit:
    """A stored block, run at every step of every trace, with the variables of the place where it was written."""

    def __init__(self, block: Block, scope: Scope) -> None:
        self.block = block
        self.scope = scope

    def add_to(self, run: Run) -> None:
        """Give a run a worker for this edit."""
        where = f"line {self.block.line} of {os.path.basename(self.block.filename)}"
        worker = EditWorker(run, f"the edit at {where}")
        body = bind(self.block, self.scope.fork(self.block))
        worker.start(lambda: _run_each_step(run, worker, body))
        run.add(worker)


class EditWorker(Worker):
    """The worker of a stored block, which knows what the block asked for in the first step."""

    __slots__ = ("_before", "_first", "_requests")
    lasting = True

    def __init__(self, run: Run, label: str) -> None:
        super().__init__(run, label)
        self._first: set[Any] = set()
        self._before: dict[Any, int] = {}
        self._requests = 0

    def request_for(self, place: Any, kind: str, path: str) -> Request:
        self._requests += 1
        if self.step == 0:
            self._first.add(place)
        return super().request_for(place, kind, path)

    def begin(self, step: int) -> None:
        """The block is about to run for a step."""
        self.step, self.calls, self._requests = step, None, 0
        self._before = self._counts() if step else {}

    def missed_nothing(self) -> bool:
        """Whether a later step has come to its end without anything of what the block changes, as an encoder's."""
        return bool(self.step) and self._requests == 1 and self._before == self._counts()

    def _counts(self) -> dict[Any, int]:
        counts = self.run.main.counts if self.run.main is not None else {}
        return {place: counts.get(place, 0) for place in self._first}


Begin = Callable[[], Callable[[int], None]]


class InterventionEdit:
    """A stored intervention, which is prepared when a run first needs it.

    `prepare` gives its parts: a name, and a function that is called once a run; what that returns is called at every
    step, with the step's number.
    """

    def __init__(self, intervention: Any, prepare: Callable[[], Iterable[tuple[str, Begin]]]) -> None:
        self.intervention = intervention
        self._prepare = prepare
        self._parts: list[tuple[str, Begin]] | None = None

    def prepare(self) -> list[tuple[str, Begin]]:
        """The parts, which the first call makes."""
        if self._parts is None:
            self._parts = list(self._prepare())
        return self._parts

    def add_to(self, run: Run) -> None:
        """Give a run a worker for each part."""
        for name, begin in self.prepare():
            _add_part(run, name, begin())


def _add_part(run: Run, name: str, act: Callable[[int], None]) -> None:
    worker = EditWorker(run, name)
    worker.start(lambda: _run_each_step(run, worker, lambda: act(worker.step or 0)))
    run.add(worker)


def _run_each_step(run: Run, worker: EditWorker, body: Callable[..., None]) -> None:
    step = 0
    while reach_step(run, worker, step):
        worker.begin(step)
        try:
            body()
        except OrderError:
            if not worker.missed_nothing():
                raise
        step += 1


class Editing:
    """The context that `model.edit()` gives: its block is stored with `store`, not run here.

    `edited` is what the `as` name is bound to.
    """

    def __init__(self, edited: Envoy, store: Callable[[Edit], None]) -> None:
        self._edited = edited
        self._store = store
        self._block: Block | None = None
        self._scope: Scope | None = None
        self._frame_scope: Scope | None = None

    def __enter__(self) -> Any:
        frame = sys._getframe(1)
        self._block = capture(frame)
        self._frame_scope = Scope(frame)
        self._scope = self._frame_scope.fork(self._block)
        skip_body(frame)
        return self._edited

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not is_skip(kind):
            if error is None:
                raise CaptureError("The body of model.edit() was run where it stands, not stored.")
            return False
        block, scope, frame_scope = self._block, self._scope, self._frame_scope
        assert block is not None
        assert scope is not None
        assert frame_scope is not None
        self._block = self._scope = self._frame_scope = None
        self._bind_target(block, scope)
        self._store(Edit(block, scope))
        return True

    def _bind_target(self, block: Block, scope: Scope) -> None:
        if block.target is not None:
            bind(block.only_target(), scope)(self._edited)
            scope.write_back(block.target_names())
        scope.detach()
