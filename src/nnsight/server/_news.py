"""News: waking those who wait for a change of a job, from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable

_Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Event, bool]


class News:
    """Waiters of every event loop, by what they wait for; and one event for the replicas."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: dict[str, list[_Waiter]] = defaultdict(list)
        self._work = threading.Condition()
        self._calls = 0
        self.relay: Callable[[str | None], None] | None = None  # to other servers: a job, or None for work

    def tell(self, job: str, *, ended: bool = True) -> None:
        """Something about this job has changed; perhaps it has `ended`."""
        self.hear(job, ended=ended)
        if self.relay is not None:
            self.relay(job)

    def tell_work(self) -> None:
        """There may be a job to run."""
        self.hear(None)
        if self.relay is not None:
            self.relay(None)

    def hear(self, job: str | None, *, ended: bool = True) -> None:
        """Wake those in this process who wait for a change of this job, or (None) for a job to run."""
        if job is None:
            with self._work:
                self._calls += 1
                self._work.notify_all()
            return
        with self._lock:
            waiters = self._waiters.pop(job, [])
            others = [] if ended else [waiter for waiter in waiters if waiter[2]]
            if others:
                self._waiters[job] = others
        for loop, event, end in waiters:
            if (ended or not end) and not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    def calls(self) -> int:
        """How often there was said to be work; to be asked for before looking for some."""
        return self._calls

    def wait_for_work(self, calls: int, seconds: float) -> None:
        """Wait until there may be a job that there was not at so many `calls`."""
        with self._work:
            if self._calls == calls:
                self._work.wait(seconds)

    def expect(self, job: str, *, end: bool = False) -> asyncio.Event:
        """Set at the next change, or when the job may have come to its `end`; to be asked for before looking at it."""
        event = asyncio.Event()
        with self._lock:
            self._waiters[job].append((asyncio.get_running_loop(), event, end))
        return event

    def forget(self, job: str, event: asyncio.Event) -> None:
        """Nobody waits for this event any more."""
        with self._lock:
            left = [waiter for waiter in self._waiters.get(job, ()) if waiter[1] is not event]
            if left:
                self._waiters[job] = left
            else:
                self._waiters.pop(job, None)
