"""Worker: intervention code as a coroutine that parks on one request at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from greenlet import GreenletExit

from ._coroutine import Coroutine
from ._visit import Request, Visit

if TYPE_CHECKING:
    from ._run import Run

_new = tuple.__new__  # a named tuple's own constructor costs three times as much
active: ContextVar[Worker | None] = ContextVar("nnsight_worker", default=None)


class Worker:
    """One block of intervention code.

    The user's own frame is a worker without a coroutine of its own; a deferred block has one.  `step` is the
    generation step its requests are about (None: each place's first visit), `calls` the places of which it
    wants a later call than the first, `rows` the rows of the batch it may see (None: all).
    """

    __slots__ = (
        "__weakref__",
        "calls",
        "condition",
        "coroutine",
        "finished",
        "instruments",
        "label",
        "outer",
        "request",
        "rows",
        "run",
        "served",
        "step",
        "stopped",
        "waited",
    )

    def __init__(self, run: Run, label: str, rows: Any = None) -> None:
        self.run: Run = run
        self.instruments = run.instruments
        self.label = label
        self.rows = rows
        self.step: int | None = None
        self.calls: dict[Any, int] | None = None
        self.request: Request | None = None
        self.condition: Callable[[], bool] | None = None
        self.served: Visit | None = None
        self.finished = False
        self.stopped = False
        self.waited: list[str] = []
        self.coroutine: Coroutine | None = None
        self.outer: Worker | None = None

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

    def enter(self) -> None:
        """Make this the worker that the current code belongs to."""
        self.outer = active.get()
        active.set(self)

    def leave(self) -> None:
        """Undo `enter`."""
        active.set(self.outer)
        self.outer = None

    # --- a deferred block --------------------------------------------------------------------------------

    def start(self, body: Callable[[], Any]) -> None:
        """Give the worker a coroutine that will run `body`."""

        def main() -> None:
            active.set(self)
            try:
                body()
            except GreenletExit:
                pass
            except BaseException as error:
                self.run.fail(error)
            finally:
                self.finished = True

        self.coroutine = Coroutine(main)

    def resume(self) -> None:
        """Let the deferred block run until it parks again or ends."""
        assert self.coroutine is not None
        self.coroutine.resume()

    def close(self) -> None:
        """Unwind the deferred block, if there is one."""
        coroutine, self.coroutine = self.coroutine, None
        self.finished = True
        if coroutine is not None:
            coroutine.kill()
