"""EngineReplica: jobs of one model in a vLLM engine, many at a time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from ..errors import EngineError, JobCancelledError
from ..protocol import Event
from ..sandbox import summary
from ._limits import Limits
from ._monitor import log
from ._news import News
from ._queue import Claim, Queue
from ._replica import Output

_BEAT = 0.25
_CHECK = 2.0


class EngineHost(Protocol):
    """An engine that computes jobs; `nnsight.vllm.Host`.

    `death` says how it has ended, None while it runs; `slots` how many requests it computes at a time.
    """

    @property
    def death(self) -> str | None: ...
    @property
    def slots(self) -> int: ...
    @property
    def completions(self) -> Any: ...
    def start(self) -> None: ...
    def begin(self, frame: bytes, show: Callable[[str], None]) -> Any: ...
    def expect_answer(self) -> None: ...
    def check(self) -> None: ...
    def close(self) -> None: ...


class _Running:
    """A claimed job; `reason` says why it is to end before it is done."""

    def __init__(self, claim: Claim, output: Output) -> None:
        self.claim = claim
        self.output = output
        self.job: Any = None
        self.began = 0.0
        self.reason: str | None = None
        self.had_company = False


class EngineReplica:
    """Serves one model from an engine until it is told to end.

    One thread claims jobs, one renews their leases and ends those that are to end, one keeps what comes of them; the
    blocks themselves run in the engine's worker, by turns.
    """

    def __init__(self, model: str, host: EngineHost, work: Queue, news: News, limits: Limits) -> None:
        self.model = model
        self.host = host
        self.ready = threading.Event()
        self.failure: str | None = None
        self._queue = work
        self._news = news
        self._limits = limits
        self._pause = 1.0  # seconds before the engine is started again
        self._ending = threading.Event()
        self._over = threading.Event()
        self._changed = threading.Condition()
        self._jobs: dict[str, _Running] = {}
        self._told: queue.SimpleQueue[tuple[_Running, str | None] | None] = queue.SimpleQueue()
        names = {self._serve: "replica", self._watch: "leases", self._settle: "answers"}
        self._threads = [
            threading.Thread(target=call, name=f"{name} of {model}", daemon=True) for call, name in names.items()
        ]

    def start(self) -> None:
        """Begin to start the engine and to take jobs."""
        for thread in self._threads:
            thread.start()

    def end(self, seconds: float | None = None) -> None:
        """Take no more jobs, and wait for those that run."""
        self._ending.set()
        self._news.tell_work()
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._jobs, seconds)
            left = list(self._jobs.values())
        for running in left:
            if running.job is not None:
                running.job.cancel()
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs, 5)
        self._over.set()
        self._told.put(None)
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:  # the first may be starting the engine
            if thread.is_alive():
                thread.join(seconds)
        self.host.close()

    # --- claiming ------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._ending.is_set():
            try:
                self.host.start()
            except Exception as error:  # vLLM has no class for what can be wrong with a model, an option or a machine
                self._fail(summary(error))
                continue
            self.failure, self._pause = None, 1.0
            self.ready.set()
            log.info("replica ready", extra={"model": self.model})
            while not self._ending.is_set() and self.host.death is None:
                try:
                    self._take()
                except Exception as error:  # the database was locked for too long, the disk is full
                    log.error("replica out of order", extra={"model": self.model, "error": type(error).__name__})
                    self._ending.wait(1.0)
            self.ready.clear()
            if not self._ending.is_set():
                self._fail(f"the engine has died ({self.host.death})")
                self._wait_until(lambda: not self._jobs)  # what it computed is given back or failed

    def _fail(self, reason: str) -> None:
        self.failure = reason
        log.error("replica failed", extra={"model": self.model, "reason": reason})
        self._ending.wait(self._pause)
        self._pause = min(2 * self._pause, 60.0)

    def _take(self) -> None:
        self._wait_until(lambda: len(self._jobs) < self.host.slots or self.host.death is not None)
        claim = self._next()
        if claim is None:
            return
        running = _Running(claim, Output(claim, self._queue, self._limits.output))
        with self._changed:
            self._jobs[claim.id] = running
        if claim.shares:
            self._begin(running)
        else:
            self._wait_until(lambda: len(self._jobs) == 1)
            self._begin(running)
            self._wait_until(lambda: not self._jobs)

    def _next(self) -> Claim | None:
        calls = self._news.calls()
        claim = self._queue.claim(self.model)
        if claim is None and not self._ending.is_set():
            self._news.wait_for_work(calls, _CHECK)
        if claim is not None and (self._ending.is_set() or self.host.death is not None):
            self._queue.give_back(claim.id, claim.turn)
            return None
        if claim is None:
            self._queue.sweep()
        return claim

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._over.is_set())

    def _begin(self, running: _Running) -> None:
        if running.reason is not None or self._ending.is_set():
            self._told.put((running, None))
            return
        running.began = time.monotonic()
        with self._changed:
            others = [other for other in self._jobs.values() if other is not running and other.job is not None]
            for one in [*others, running] if others else []:
                one.had_company = True
        try:
            running.job = self.host.begin(running.claim.frame, lambda text: self._told.put((running, text)))
        except EngineError:
            self._told.put((running, None))
            return
        running.job.on_end(partial(self._told.put, (running, None)))
        if running.reason is not None:  # it was cancelled meanwhile
            running.job.cancel()

    # --- while they run ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(_BEAT):
            try:
                self._look_after(list(self._jobs.values()))
            except Exception as error:  # the database was locked for too long
                log.error("replica out of order", extra={"model": self.model, "error": type(error).__name__})

    def _look_after(self, jobs: list[_Running]) -> None:
        unwanted = self._queue.beat_all([running.claim for running in jobs]) if jobs else set()
        for running in jobs:
            late = running.job is not None and time.monotonic() - running.began > running.claim.seconds
            if running.reason is not None or not (late or running.claim.id in unwanted):
                continue
            late_text = f"The job ran for more than {running.claim.seconds:g} seconds, and was ended."
            running.reason = "cancelled" if running.claim.id in unwanted else late_text
            if running.job is not None:
                running.job.cancel()
                self.host.expect_answer()
        self.host.check()

    # --- what comes of them --------------------------------------------------------------------------------------

    def _settle(self) -> None:
        while (told := self._told.get()) is not None:
            running, text = told
            try:
                if text is None:
                    self._end(running)
                elif running.claim.id in self._jobs:
                    running.output(Event("print", text))
            except Exception as error:  # the database was locked for too long, the disk is full
                log.error("replica out of order", extra={"model": self.model, "error": type(error).__name__})
            finally:
                if text is None:
                    with self._changed:
                        self._jobs.pop(running.claim.id, None)
                        self._changed.notify_all()
                    self._news.tell_work()

    def _end(self, running: _Running) -> None:
        claim = running.claim
        try:
            answer = running.job.result() if running.job is not None else None
        except JobCancelledError:
            answer = None
        except EngineError as error:
            if running.reason is None and self.host.death is not None:
                self._lose(running)
                return
            answer, running.reason = None, running.reason or str(error)
        if answer is not None:
            self._keep(claim, answer)
        elif running.reason is None:  # not begun, or the server ends
            self._queue.give_back(claim.id, claim.turn)
        elif running.reason == "cancelled":
            self._queue.stopped(claim.id, claim.turn)
        else:
            self._queue.fail(claim.id, running.reason, claim.turn)

    def _lose(self, running: _Running) -> None:
        """The engine died under a job: the one that ran by itself fails, of several nobody knows which it was."""
        log.warning("job lost", extra={"job": running.claim.id, "model": self.model, "reason": self.host.death})
        if running.had_company:
            self._queue.give_back(running.claim.id, running.claim.turn, alone=True)
        else:
            self._queue.fail(running.claim.id, _DIED.format(how=self.host.death), running.claim.turn)

    def _keep(self, claim: Claim, answer: bytes) -> None:
        job, turn = claim.id, claim.turn
        if len(answer) > self._limits.answer:
            self._queue.fail(job, f"The saved values have {len(answer)} bytes; at most {self._limits.answer} do.", turn)
            return
        try:
            self._queue.finish(job, answer, turn)
        except OSError as error:
            log.error("answer not kept", extra={"job": job, "error": type(error).__name__, "number": error.errno})
            self._queue.fail(job, "The server had no room for the answer.", turn)


_DIED = "The process of the engine died while it computed this job and no other ({how})."
