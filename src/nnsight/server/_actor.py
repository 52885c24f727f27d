"""ModelActor: what Ray runs on a node for a replica, beside the process that holds the model."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import msgspec

from ..protocol import Event, versions
from ._limits import Limits
from ._process import ConfinedRunner, TrustedRunner
from ._replica import DiedError, NotBegunError

TAKEN, HAPPENED, ANSWERED, NOT_BEGUN, DIED = range(5)  # what a job in an actor says
_LOOK = 1.0


class Charge(msgspec.Struct):
    """What an actor is for: two are the same where all of this is."""

    model: str
    name: str
    options: str  # JSON
    limits: Limits
    trusted: bool
    version: str
    resources: dict[str, float]
    patience: float  # seconds without a word of a server, after which the actor ends


class Said(NamedTuple):
    """One thing that a job in an actor says."""

    kind: int
    data: bytes


class ModelActor:
    """Has jobs run as an embedded replica has, by the same runner; it outlives the server that made it for a while.

    Args:
        charge: A `Charge` as JSON.
        leave: Called when no server has asked for anything for long.
    """

    def __init__(self, charge: str, leave: Callable[[], None]) -> None:
        self._charge = charge
        given = msgspec.json.decode(charge, type=Charge)
        runner = TrustedRunner if given.trusted else ConfinedRunner
        self._limits = given.limits
        self._patience = given.patience
        self._runner = runner(given.name, msgspec.json.decode(given.options), given.limits)
        # One thread does all that starts processes, which die with the thread that has started them.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._running: Future[None] | None = None
        here = versions().nnsight
        self._problem = (
            f"the node has nnsight {here}, and the server {given.version}" if here != given.version else None
        )
        self._heard = time.monotonic()
        threading.Thread(target=self._leave_when_alone, args=(leave,), daemon=True).start()

    def charge(self) -> str:
        """What it is for."""
        self._heard = time.monotonic()
        return self._charge

    def process_id(self) -> int | None:
        """The process that holds the model."""
        return self._runner.process_id

    def adopt(self) -> None:
        """End what runs for a server that is gone."""
        self._heard = time.monotonic()
        running = self._running
        while running is not None and not running.done():
            self._runner.stop()
            threading.Event().wait(0.05)

    def start(self, *, loaded: bool = True) -> str | None:
        """Load the model, or let go of it; what is wrong, where something is."""
        self._heard = time.monotonic()
        if self._problem is not None:
            return self._problem
        try:
            self._thread.submit(self._runner.start if loaded else self._runner.rest).result()
        except DiedError as error:
            return str(error)
        finally:
            self._heard = time.monotonic()
        return None

    def run(self, frame: bytes, kind: bytes, owners: list[str]) -> Iterator[Said]:
        """Run a job, and tell what happens until its answer."""
        self._heard = time.monotonic()
        said: SimpleQueue[Said] = SimpleQueue()
        self._running = self._thread.submit(self._run, frame, kind, owners, said)
        yield Said(TAKEN, b"")
        while True:
            found = said.get()
            yield found
            if found.kind != HAPPENED:
                self._heard = time.monotonic()
                return

    def _run(self, frame: bytes, kind: bytes, owners: list[str], said: SimpleQueue[Said]) -> None:
        def emit(event: Event) -> None:
            said.put(Said(HAPPENED, msgspec.json.encode(event)))

        try:
            said.put(Said(ANSWERED, self._runner.run_kind(frame, emit, kind, owners)))
        except NotBegunError as error:
            said.put(Said(NOT_BEGUN, str(error).encode()))
        except DiedError as error:
            said.put(Said(DIED, str(error).encode()))
        except BaseException as error:
            said.put(Said(DIED, f"{type(error).__name__}: {error}".encode()))
            raise

    def stop(self) -> None:
        """End the job that runs."""
        self._heard = time.monotonic()
        self._runner.stop()

    def _leave_when_alone(self, leave: Callable[[], None]) -> None:
        node = os.getppid()
        while True:
            threading.Event().wait(_LOOK)
            if os.getppid() != node:  # the node's own process has died, and Ray counts this one as dead
                os._exit(1)
            busy = self._running is not None and not self._running.done()
            allowed = self._patience + (self._limits.seconds if busy else 0.0)
            if time.monotonic() - self._heard > allowed:
                self._runner.stop()
                leave()
                return


def leave_the_cluster() -> None:
    """Give back the place of this actor, which ends its process."""
    import ray.util

    group = ray.util.get_current_placement_group()
    if group is not None:
        ray.util.remove_placement_group(group)
