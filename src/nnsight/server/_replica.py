"""Replica: a thread that takes jobs of one model from the queue and has them run."""

from __future__ import annotations

import errno
import threading
import time
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from ..protocol import Event, Shared
from ._limits import Limits
from ._monitor import log
from ._news import News
from ._queue import Claim, Queue

_BEAT = 0.25
_CHECK = 5.0
_SWEEP = 1.0  # seconds between two sweeps at least; busy, it is _CHECK
_LONGEST_TOGETHER = 5.0  # seconds that jobs may share a forward for


class DiedError(Exception):
    """What ran a job has ended without an answer."""


class NoRoomError(DiedError):
    """There is no place for what is to run jobs."""


class NotBegunError(DiedError):
    """What was to run a job has ended before it began."""


class Runner(Protocol):
    """Runs one job at a time on a model, or several in one forward; see `_process` and `_embed`.

    `mixes_owners` says whether jobs of several users may be in one process; others keep them apart.
    """

    mixes_owners: bool

    def start(self) -> None:
        """Load the model, if it is not there."""

    def rest(self) -> None:
        """Let go of the weights, and keep what loading them again is quicker with."""

    def run(self, frame: bytes, emit: Emit, owner: str) -> bytes:
        """The answer to a job of a user's."""
        ...

    def run_together(self, frames: list[bytes], owners: list[str]) -> Shared:
        """What jobs in one forward have left, each of which is of one of these users."""
        ...

    def stop(self) -> None:
        """End the job that runs now, from another thread: `run` raises `DiedError` soon; nothing where none does."""

    def close(self) -> None:
        """Let go of the model."""


class Emit(Protocol):
    """Takes what happens while a job runs."""

    def __call__(self, event: Event) -> None: ...


class Replica:
    """Serves one model until it is told to end.

    `ready` says that it takes jobs, `rested` that it holds no weights.
    """

    def __init__(self, model: str, runner: Runner, queue: Queue, news: News, limits: Limits) -> None:
        self.model = model
        self.ready = threading.Event()
        self.rested = threading.Event()
        self.failure: str | None = None
        self.cramped = False
        self._runner = runner
        self._queue = queue
        self._news = news
        self._limits = limits
        self._swept = time.monotonic()
        self._ending = threading.Event()
        self._resting = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=f"replica of {model}", daemon=True)

    def start(self) -> None:
        """Begin to load the model and to take jobs."""
        self._thread.start()

    def rest(self) -> None:
        """Let go of the weights, when the job that runs has ended."""
        self._resting.set()
        self._news.hear(None)

    def wake(self) -> None:
        """Load the weights again."""
        self.rested.clear()
        self._resting.clear()
        self._news.hear(None)

    def end(self, seconds: float | None = None) -> None:
        """Take no more jobs, and wait for the one that runs."""
        self._ending.set()
        self._news.tell_work()
        if self._thread.is_alive():
            self._thread.join(seconds)
        if self._thread.is_alive():
            self._runner.stop()
            self._thread.join(5)
        self._runner.close()

    def _serve(self) -> None:
        while not self._ending.is_set():
            try:
                if self._resting.is_set():
                    self._rest()
                    continue
                self.rested.clear()
                self._runner.start()
                self.failure, self.cramped = None, False
                if not self.ready.is_set():
                    log.info("replica ready", extra={"model": self.model})
                self.ready.set()
                claim = self._next()
                if claim is not None:
                    self._run_with_others(claim)
            except DiedError as error:
                self.ready.clear()
                known, self.failure, self.cramped = self.failure, str(error), isinstance(error, NoRoomError)
                if known != self.failure:
                    log.error("replica failed", extra={"model": self.model, "reason": str(error)})
                self._ending.wait(1.0)
            except Exception as error:  # the database was locked for too long, the disk is full
                log.error("replica out of order", extra={"model": self.model, "error": type(error).__name__})
                self._ending.wait(1.0)

    def _rest(self) -> None:
        self.ready.clear()
        self._runner.rest()
        self.failure, self.cramped = None, False
        calls = self._news.calls()
        if self._resting.is_set():
            self.rested.set()
        if self._resting.is_set() and not self._ending.is_set():
            self._news.wait_for_work(calls, _CHECK)

    def _next(self) -> Claim | None:
        self._sweep(_CHECK)
        calls = self._news.calls()
        claim = self._queue.claim(self.model)
        if claim is None and not self._ending.is_set() and not self._resting.is_set():
            self._news.wait_for_work(calls, _CHECK)
        if claim is not None and self._ending.is_set():
            self._queue.give_back(claim.id, claim.turn)
            return None
        if claim is None:
            self._sweep(_SWEEP)
        return claim

    def _sweep(self, seconds: float) -> None:
        """Look for jobs whose replica has died, and forget old ones, unless that was done so many seconds ago."""
        if time.monotonic() - self._swept > seconds:
            self._queue.sweep()
            self._swept = time.monotonic()

    def _run_with_others(self, claim: Claim) -> None:
        others = self._queue.claim_beside(claim, self.model, same_owner=not self._runner.mixes_owners)
        if not others and not self._runner.mixes_owners:
            others = self._queue.claim_beside(claim, self.model, same_owner=False)
        if others:
            self._run_together([claim, *others])
        else:
            self._run(claim)

    def _run_together(self, claims: list[Claim]) -> None:
        """Run jobs in one forward; those that this does not serve are to be run alone."""
        shared = Shared([], [])
        seconds = min(_LONGEST_TOGETHER, *(claim.seconds for claim in claims))
        watch = _Watch(claims, seconds, self._queue, self._runner)
        watch.start()
        try:
            shared = self._runner.run_together([claim.frame for claim in claims], [claim.owner for claim in claims])
        except DiedError as error:  # one of them was cancelled, takes long, or is fatal: alone it harms none but itself
            log.info("forward not shared", extra={"model": self.model, "reason": watch.reason or str(error)})
        finally:
            watch.end()
            self._settle(claims, shared)

    def _settle(self, claims: list[Claim], shared: Shared) -> None:
        """End the jobs that were answered, and give the others back."""
        served = 0
        for number, claim in enumerate(claims):
            answer = shared.answers[number] if number < len(shared.answers) else None
            if answer is None or len(answer) > self._limits.answer:
                self._queue.give_back(claim.id, claim.turn, alone=True)
                continue
            served += 1
            output = Output(claim, self._queue, self._limits.output)
            for event in shared.events[number]:
                output(event)
            self._queue.finish(claim.id, answer, claim.turn)
        if served:
            self._queue.monitor.shared(self.model, served)

    def _run(self, claim: Claim) -> None:
        watch = _Watch([claim], claim.seconds, self._queue, self._runner)
        watch.start()
        output = Output(claim, self._queue, self._limits.output)
        try:
            answer = self._runner.run(claim.frame, output, claim.owner)
        except NotBegunError:
            watch.end()
            self._queue.give_back(claim.id, claim.turn)
            raise
        except DiedError as error:
            if watch.reason is None:
                log.warning("job lost", extra={"job": claim.id, "model": self.model, "reason": str(error)})
            watch.end()
            if watch.reason == "cancelled":
                self._queue.stopped(claim.id, claim.turn)
            elif watch.reason is not None:
                self._queue.fail(claim.id, watch.reason, claim.turn)
            elif self._ending.is_set():
                self._queue.give_back(claim.id, claim.turn)
            else:
                self._queue.lose(claim.id, claim.turn)
            return
        finally:
            watch.end()
        if len(answer) > self._limits.answer:
            reason = f"The saved values have {len(answer)} bytes; at most {self._limits.answer} do."
            self._queue.fail(claim.id, reason, claim.turn)
            return
        try:
            self._queue.finish(claim.id, answer, claim.turn)
        except OSError as error:
            log.error("answer not kept", extra={"job": claim.id, "error": type(error).__name__, "number": error.errno})
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "The server had no room for the answer." if full else "The server could not keep the answer."
            self._queue.fail(claim.id, reason, claim.turn)


class _Watch(threading.Thread):
    """Renews the lease of a job that runs, and ends it where its user or its time says so."""

    def __init__(self, claims: list[Claim], seconds: float, queue: Queue, runner: Runner) -> None:
        super().__init__(name="watch", daemon=True)
        self.reason: str | None = None
        self._claims = claims
        self._seconds = seconds
        self._queue = queue
        self._runner = runner
        self._done = threading.Event()
        self._deciding = threading.Lock()

    def end(self) -> None:
        """The job has ended; nothing is stopped from here on, and the reason stays what it is."""
        with self._deciding:
            self._done.set()

    def run(self) -> None:
        beats = 0
        while not self._done.wait(_BEAT):
            beats += 1
            reason = self.reason or self._reason(beats * _BEAT)
            with self._deciding:
                if reason is not None and not self._done.is_set():
                    self.reason = reason
                    self._runner.stop()  # and again: the first time, it may not have begun

    def _reason(self, seconds: float) -> str | None:
        """Why to end the job, if there is a reason."""
        try:
            wanted = [self._queue.beat(claim.id, claim.turn) for claim in self._claims]
        except SQLAlchemyError as error:  # the lease may run out meanwhile, and another take the job
            log.error("lease not renewed", extra={"error": type(error).__name__})
            wanted = []
        if not all(wanted):
            return "cancelled"
        if seconds > self._seconds:
            return f"The job ran for more than {self._seconds:g} seconds, and was ended."
        return None


class Output:
    """Keeps a job's events, up to a limit."""

    def __init__(self, claim: Claim, queue: Queue, limit: int) -> None:
        self._claim = claim
        self._queue = queue
        self._left = limit
        self._number = 0

    def __call__(self, event: Event) -> None:
        if self._left <= 0:
            return
        self._left -= len(event.text) + 64
        if self._left <= 0:
            event = Event("print", "\n[the job has printed as much as one may; the rest is left out]\n")
        self._queue.note(self._claim.id, self._number, event, self._claim.turn)
        self._number += 1
