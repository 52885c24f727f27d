"""Worker: intervention code as a coroutine that parks on one request at a time."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

from ._coroutine import Coroutine
from ._modes import capture_modes, end_loan, is_inference, lend_inference, switch_modes
from ._visit import Request, Visit

if TYPE_CHECKING:
    from ._instrument import Instruments
    from ._run import Run

_new = tuple.__new__  # a named tuple's own constructor costs three times as much
_CAN_SUSPEND = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_ENTERING = ("__enter__", "__aenter__")
_CONTEXTLIB = contextlib.contextmanager.__code__.co_filename

active: ContextVar[Worker | None] = ContextVar("nnsight_worker", default=None)


def find_worker(instruments: Instruments | None = None) -> Worker | None:
    """The block that the current code belongs to, of a run of this tree if one is given."""
    worker, candidates = active.get(), []
    while worker is not None:
        if not worker.finished and (instruments is None or worker.run.instruments is instruments):
            candidates.append(worker)
        worker = worker.outer
    return candidates[0] if len(candidates) == 1 else _nearest(candidates)


def worker_of(run: Run) -> Worker | None:
    """The block of a run that the current code belongs to, also inside a block of another one."""
    worker = active.get()
    while worker is not None and (worker.run is not run or worker.finished):
        worker = worker.outer
    return worker


def _nearest(candidates: list[Worker]) -> Worker | None:
    # Generators share the context of their caller: whose `with` block is on the stack tells them apart.
    depths: dict[FrameType | None, int] = {}
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        depths[frame] = len(depths)
        frame = frame.f_back
    for worker in candidates:
        if worker.frame in depths:
            return min((w for w in candidates if w.frame in depths), key=lambda w: depths[w.frame])
        if worker.frame is None or not worker.frame.f_code.co_flags & _CAN_SUSPEND:
            return worker  # entered by a call, not by a `with` statement
    return candidates[0] if candidates else None


def _frame_of_body(frame: FrameType) -> FrameType:
    # Where a context manager enters a trace, the block is that of its user.
    user: FrameType | None = frame
    while user is not None and _enters_for_another(user):
        user = user.f_back
    return user or frame


def _enters_for_another(frame: FrameType) -> bool:
    code, outer = frame.f_code, frame.f_back
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        return outer is not None and outer.f_code.co_filename == _CONTEXTLIB
    return code.co_filename == _CONTEXTLIB or code.co_name in _ENTERING


class Worker:
    """One block of intervention code.

    The user's own frame is a worker without a coroutine of its own; a deferred block has one.  `step` is the
    generation step its requests are about (None: each place's first visit), `calls` the places of which it
    wants a later call than the first, `rows` the rows of the batch it may see (None: all).  `instruments` are those
    of its run while it is the only one that is active here, else None; `frame` is where its `with` statement stands.  A
    `lasting` one is there for the others: no run goes on for it.
    """

    lasting: ClassVar[bool] = False

    __slots__ = (
        "__weakref__",
        "_modes",
        "calls",
        "condition",
        "coroutine",
        "finished",
        "frame",
        "instruments",
        "label",
        "outer",
        "request",
        "rows",
        "run",
        "served",
        "step",
        "stopped",
        "tracer",
        "waited",
    )

    def __init__(self, run: Run, label: str, rows: Any = None) -> None:
        self.run: Run = run
        self.instruments: Instruments | None = run.instruments
        self.label = label
        self.rows = rows
        self.step: int | None = None
        self.calls: dict[Any, int] | None = None
        self.request: Request | None = None
        self.condition: Callable[[], bool] | None = None
        self.served: Visit | None = None
        self.finished = False
        self.stopped = False
        self.tracer: Any = None
        self.waited: list[str] = []
        self.coroutine: Coroutine | None = None
        self.outer: Worker | None = None
        self.frame: FrameType | None = None

    def request_for(self, place: Any, kind: str, path: str) -> Request:
        """What this worker asks for when its code names a place."""
        call = self.calls.get(place, 0) if self.calls else 0
        return _new(Request, (place, kind, path, self.step, call))

    def is_ready(self) -> bool:
        """Whether this worker, which waits for no place, can go on."""
        if self.finished:
            return False
        if self.condition is not None:
            return self.condition()
        return self.coroutine is not None and not self.coroutine

    # --- the user's own frame ----------------------------------------------------------------------------

    def enter(self, frame: FrameType) -> None:
        """Make this the worker that the code of `frame`, and what that calls, belongs to."""
        code = frame.f_code
        if code.co_flags & _CAN_SUSPEND or code.co_filename == _CONTEXTLIB or code.co_name in _ENTERING:
            frame = _frame_of_body(frame)
        self.frame = frame
        outer = active.get()
        while outer is not None and outer.finished:  # one that ended in another thread
            outer = outer.outer
        self.outer = outer
        if outer is not None:
            self.instruments = outer.instruments = None
        active.set(self)

    def leave(self) -> None:
        """Undo `enter`; workers may end in any order."""
        self.frame = self.instruments = None
        worker = active.get()
        if worker is self:
            active.set(self.outer)
        else:
            while worker is not None and worker.outer is not self:
                worker = worker.outer
            if worker is not None:
                worker.outer = self.outer
        last = active.get()
        if last is not None and last.outer is None and not last.finished:
            last.instruments = last.run.instruments

    # --- a deferred block --------------------------------------------------------------------------------

    def start(self, body: Callable[[], Any]) -> None:
        """Give the worker a coroutine that will run `body`."""

        def main() -> None:
            active.set(self)
            try:
                body()
            except BaseException as error:
                if not self.finished:  # else it is being closed
                    self.run.fail(error)
            finally:
                self.finished = True

        self._modes = capture_modes()
        self.coroutine = Coroutine(main)

    def resume(self) -> None:
        """Let the deferred block run until it parks again or ends."""
        assert self.coroutine is not None
        model, own = capture_modes(), self._modes
        lent = is_inference(model) and not is_inference(own)
        switch_modes(model, lend_inference(own) if lent else own)
        self.coroutine.resume()
        now = capture_modes()
        self._modes = end_loan(now) if lent else now
        switch_modes(now, model)

    def close(self) -> None:
        """Unwind the deferred block, if there is one."""
        coroutine, self.coroutine = self.coroutine, None
        self.finished = True
        if coroutine is not None:
            here = capture_modes()
            switch_modes(here, self._modes)  # the block's own `with` statements end here
            coroutine.kill()
            switch_modes(capture_modes(), here)
