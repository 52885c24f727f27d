"""Fleet: the models that a server serves, each with its replicas; models come and go while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ..errors import NNsightError
from ..protocol import ModelInfo
from ._budget import Budget, BudgetError, Standing, Tier, plan
from ._monitor import log
from ._queue import Queue

DRAIN = 60.0  # seconds that running jobs have to end
_TEND = 0.5  # seconds between two looks at which models are wanted


class UnknownModelError(NNsightError):
    """A model that is not served here."""


class ServedError(NNsightError):
    """A model that is served already."""


class WrongEngineError(NNsightError):
    """A block for modules of another library than those that are served."""


class Member(Protocol):
    """What serves a model: a `Replica`, or an `EngineReplica`."""

    ready: threading.Event
    failure: str | None

    def start(self) -> None: ...
    def end(self, seconds: float | None = None) -> None: ...


@runtime_checkable
class Restable(Member, Protocol):
    """What can give its memory back and take it again, as every member of a fleet with a budget: a `Replica`."""

    rested: threading.Event
    cramped: bool

    def rest(self) -> None: ...
    def wake(self) -> None: ...


@dataclass
class _Served:
    size: int = 0  # bytes of the weights of all its replicas
    tier: Tier = "cold"
    replicas: Sequence[Member] = ()
    since: float = field(default_factory=time.time)  # of its tier

    def restable(self) -> list[Restable]:
        """The replicas of a fleet with a budget."""
        found = [replica for replica in self.replicas if isinstance(replica, Restable)]
        assert len(found) == len(self.replicas), "an engine keeps its memory, so it has no budget"
        return found

    def holds(self) -> bool:
        return any(not replica.rested.is_set() for replica in self.restable())


class Fleet:
    """Replicas by model.

    Args:
        models: Those to begin with.
        make: The replicas of a model, not started.
        queue: Their queue.
        keep: Called with the names of all models when they change.
        budget: What they may take together; by default all of them are loaded.
        size_of: The bytes of a model's weights in all its replicas; asked for where there is a budget.
        tidy: Called at the start with the models that are loaded then.
        engine: What computes all of them, where it is not transformers.
    """

    def __init__(
        self,
        models: Iterable[str],
        make: Callable[[str], Sequence[Member]],
        queue: Queue,
        keep: Callable[[Sequence[str]], None] = lambda _: None,
        *,
        budget: Budget | None = None,
        size_of: Callable[[str], int] = lambda _: 0,
        tidy: Callable[[Sequence[str]], None] = lambda _: None,
        engine: str = "",
    ) -> None:
        self._make = make
        self._queue = queue
        self._keep = keep
        self._budget = budget
        self._size_of = size_of
        self._tidy = tidy
        self._lock = threading.RLock()
        self._served = {model: _Served(self._measure(model)) for model in models}
        self._leaving: dict[str, threading.Thread] = {}
        self._ending = threading.Event()
        self._tending = threading.Thread(target=self._tend, name="fleet", daemon=True)
        if budget is None:
            for model in self._served:
                self._make_replicas(model)
        self.engine = engine

    def names(self) -> list[str]:
        """The models that are served."""
        return list(self._served)

    def check(self, model: str) -> None:
        """Refuse a model that is not served.

        Raises:
            UnknownModelError: It is not.
        """
        if model not in self._served:
            served = ", ".join(self._served) or "none"
            raise UnknownModelError(f"The model {model!r} is not served here; served are: {served}.")

    def check_engine(self, model: str, engine: str) -> None:
        """Refuse a block that was written for the modules of another library.

        Raises:
            WrongEngineError: It was.
        """
        if engine != self.engine:
            raise WrongEngineError((_NOT_VLLM if engine else _VLLM).format(model=model.partition("@")[0]))

    def members(self, model: str) -> Sequence[Member]:
        """What serves a model.

        Raises:
            UnknownModelError: It is not served.
        """
        self.check(model)
        return self._served[model].replicas

    def start(self) -> None:
        """Load all models, or as many as there is room for, those that were used last first."""
        used = self._queue.used()
        loaded: list[str] = []
        for model in sorted(self._served, key=lambda model: -used.get(model, 0.0)):
            if self._fits(sum(self._served[each].size for each in [*loaded, model])):
                loaded.append(model)
        self._tidy(loaded)
        for model in loaded:
            self._turn(model, "hot")
        if self._budget is not None:
            self._tending.start()

    def deploy(self, model: str) -> None:
        """Serve another model; it is loaded in the background, where there is room at once, else when a job wants it.

        Raises:
            ServedError: It is served already.
            BudgetError: It never has room.
        """
        size = self._measure(model)
        with self._lock:
            if model in self._served:
                raise ServedError(f"The model {model!r} is served already.")
            if model in self._leaving and self._leaving[model].is_alive():
                raise ServedError(f"The model {model!r} is still being taken out of service: try again soon.")
            self._served[model] = _Served(size)
            self._keep(self.names())
            log.info("model deployed", extra={"model": model})
            if self._budget is None or self._fits(size + self._held()):
                self._turn(model, "hot")

    def evict(self, model: str) -> None:
        """Serve a model no longer: what runs may end, what waits fails."""
        with self._lock:
            self.check(model)
            replicas = self._served.pop(model).replicas
            self._keep(self.names())
            log.info("model evicted", extra={"model": model})
            self._leaving[model] = threading.Thread(target=_end, args=(replicas, DRAIN), name=f"end of {model}")
            self._leaving[model].start()
        self._queue.fail_waiting(model, f"The model {model!r} was taken out of service before the job's turn.")

    def end(self) -> None:
        """Let running jobs end, all replicas at once; those that wait stay in the queue."""
        self._ending.set()
        if self._tending.is_alive():
            self._tending.join()
        _end([replica for served in self._served.values() for replica in served.replicas], DRAIN)
        for thread in self._leaving.values():
            thread.join()

    # --- memory ----------------------------------------------------------------------------------------------

    def _measure(self, model: str) -> int:
        if self._budget is None:
            return 0
        size = self._size_of(model)
        if not self._fits(size):
            raise BudgetError(
                f"The model {model!r} has {size / 2**20:,.1f} MiB of weights in its replicas, and the memory budget of "
                f"the server is {self._budget.memory / 2**20:,.1f} MiB."
            )
        return size

    def _fits(self, size: int) -> bool:
        return self._budget is None or size <= self._budget.memory

    def _held(self) -> int:
        return sum(served.size for served in self._served.values() if served.holds())

    def _make_replicas(self, model: str) -> None:
        self._served[model].replicas = self._make(model)
        self._served[model].tier = "hot"

    def _tend(self) -> None:
        """Load what is wanted, and unload what is not, while the server runs."""
        assert self._budget is not None
        while not self._ending.wait(_TEND):
            try:
                for model, tier in plan(self._standings(), self._budget):
                    with self._lock:
                        if model in self._served:
                            self._turn(model, tier)
            except Exception as error:  # the database was locked for too long
                log.error("fleet out of order", extra={"error": type(error).__name__})

    def _standings(self) -> list[Standing]:
        now, waiting = time.time(), self._queue.waiting()
        running, used = self._queue.counts("running"), self._queue.used()
        with self._lock:
            return [
                Standing(
                    model,
                    served.size,
                    served.tier,
                    served.holds(),
                    now - waiting[model] if model in waiting else None,
                    running.get(model, 0),
                    now - max(used.get(model, 0.0), served.since if served.tier == "hot" else 0.0),
                    now - served.since,
                    any(replica.cramped for replica in served.restable()),
                )
                for model, served in self._served.items()
            ]

    def _turn(self, model: str, tier: Tier) -> None:
        """Make a model hot, warm or cold."""
        served = self._served[model]
        if tier != served.tier:
            log.info("model turns", extra={"model": model, "from": served.tier, "to": tier})
        begin = tier == "hot" and not (served.replicas and served.tier == "warm")
        if begin and not served.replicas:
            self._make_replicas(model)
        if begin:
            for replica in served.replicas:
                replica.start()
        elif tier != "cold":
            for replica in served.restable():
                (replica.wake if tier == "hot" else replica.rest)()
        if tier == "cold":
            _end(served.replicas, DRAIN)
            served.replicas = ()
        served.tier, served.since = tier, time.time()

    # --- what there is ---------------------------------------------------------------------------------------

    def ready(self) -> dict[str, float]:
        """How many replicas of each model can take jobs."""
        return {
            model: sum(replica.ready.is_set() for replica in served.replicas)
            for model, served in list(self._served.items())
        }

    def info(self, *, reasons: bool) -> list[ModelInfo]:
        """What clients may know; `reasons` says why a replica is not there."""
        waiting, running, ready = self._queue.counts(), self._queue.counts("running"), self.ready()
        return [
            ModelInfo(
                name=model.partition("@")[0],
                revision=model.partition("@")[2] or None,
                running=ready[model] > 0,
                queued=waiting.get(model, 0),
                active=running.get(model, 0),
                replicas=len(served.replicas),
                ready=int(ready[model]),
                failure=_failure(served.replicas, reasons=reasons),
                tier=served.tier,
                engine=self.engine,
            )
            for model, served in list(self._served.items())
            if model in ready
        ]


def _end(replicas: Sequence[Member], seconds: float) -> None:
    """End replicas, all at once."""
    threads = [threading.Thread(target=replica.end, args=(seconds,)) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _failure(replicas: Sequence[Member], *, reasons: bool) -> str | None:
    found = next((replica.failure for replica in replicas if replica.failure is not None), None)
    return found if reasons or found is None else "not available"


_VLLM = """\
{model!r} is served by vLLM here, whose modules are others than those of transformers: from nnsight.modeling.vllm import VLLM; \
VLLM({model!r}).trace(…, remote=True)."""

_NOT_VLLM = """\
{model!r} is not served by vLLM here: LanguageModel({model!r}).trace(…, remote=True), or a server that was started with \
--engine vllm."""
