"""News: waking those who wait for a change of a job, from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable

_Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Event]


class News:
    """Waiters of every event loop, by what they wait for; and one event for the replicas."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: dict[str, list[_Waiter]] = defaultdict(list)
        self.work = threading.Condition()
        self.relay: Callable[[str | None], None] | None = None  # to other servers: a job, or None for work

    def tell(self, job: str) -> None:
        """Something about this job has changed."""
        self.hear(job)
        if self.relay is not None:
            self.relay(job)

    def tell_work(self) -> None:
        """There may be a job to run."""
        self.hear(None)
        if self.relay is not None:
            self.relay(None)

    def hear(self, job: str | None) -> None:
        """Wake those in this process who wait for a change of this job, or (None) for a job to run."""
        if job is None:
            with self.work:
                self.work.notify_all()
            return
        with self._lock:
            waiters = self._waiters.pop(job, [])
        for loop, event in waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    def expect(self, job: str) -> asyncio.Event:
        """Set at the next change; to be asked for before looking at the job."""
        event = asyncio.Event()
        with self._lock:
            self._waiters[job].append((asyncio.get_running_loop(), event))
        return event

    def forget(self, job: str, event: asyncio.Event) -> None:
        """Nobody waits for this event any more."""
        with self._lock:
            left = [waiter for waiter in self._waiters.get(job, ()) if waiter[1] is not event]
            if left:
                self._waiters[job] = left
            else:
                self._waiters.pop(job, None)
