"""Fleet: the models that a server serves, each with its replicas; models come and go while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from ..errors import NNsightError
from ..protocol import ModelInfo
from ._monitor import log
from ._queue import Queue

DRAIN = 60.0  # seconds that running jobs have to end


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


class Fleet:
    """Replicas by model.

    Args:
        models: Those to begin with.
        make: The replicas of a model, not started.
        queue: Their queue.
        keep: Called with the names of all models when they change.
        engine: What computes all of them, where it is not transformers.
    """

    def __init__(
        self,
        models: Iterable[str],
        make: Callable[[str], Sequence[Member]],
        queue: Queue,
        keep: Callable[[Sequence[str]], None] = lambda _: None,
        engine: str = "",
    ) -> None:
        self._make = make
        self._queue = queue
        self._keep = keep
        self.engine = engine
        self._lock = threading.Lock()
        self._replicas = {model: make(model) for model in models}
        self._leaving: list[threading.Thread] = []

    def names(self) -> list[str]:
        """The models that are served."""
        return list(self._replicas)

    def check(self, model: str) -> None:
        """Refuse a model that is not served.

        Raises:
            UnknownModelError: It is not.
        """
        if model not in self._replicas:
            served = ", ".join(self._replicas) or "none"
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
        return self._replicas[model]

    def start(self) -> None:
        """Load all models."""
        for replicas in self._replicas.values():
            for replica in replicas:
                replica.start()

    def deploy(self, model: str) -> None:
        """Serve another model; it is loaded in the background.

        Raises:
            ServedError: It is served already.
        """
        with self._lock:
            if model in self._replicas:
                raise ServedError(f"The model {model!r} is served already.")
            replicas = self._replicas[model] = self._make(model)
        self._keep(self.names())
        log.info("model deployed", extra={"model": model})
        for replica in replicas:
            replica.start()

    def evict(self, model: str) -> None:
        """Serve a model no longer: what runs may end, what waits fails."""
        with self._lock:
            self.check(model)
            replicas = self._replicas.pop(model)
        self._keep(self.names())
        log.info("model evicted", extra={"model": model})
        for replica in replicas:
            self._leaving.append(threading.Thread(target=replica.end, args=(DRAIN,), name=f"end of {model}"))
            self._leaving[-1].start()
        self._queue.fail_waiting(model, f"The model {model!r} was taken out of service before the job's turn.")

    def end(self) -> None:
        """Let running jobs end, all replicas at once; those that wait stay in the queue."""
        deadline = time.monotonic() + DRAIN
        every = [replica for replicas in self._replicas.values() for replica in replicas]
        threads = [threading.Thread(target=replica.end, args=(deadline - time.monotonic(),)) for replica in every]
        for thread in threads:
            thread.start()
        for thread in [*threads, *self._leaving]:
            thread.join()

    # --- what there is ---------------------------------------------------------------------------------------

    def ready(self) -> dict[str, float]:
        """How many replicas of each model can take jobs."""
        return {
            model: sum(replica.ready.is_set() for replica in replicas) for model, replicas in self._replicas.items()
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
                replicas=len(replicas),
                ready=int(ready[model]),
                failure=_failure(replicas, reasons=reasons),
                engine=self.engine,
            )
            for model, replicas in self._replicas.items()
            if model in ready
        ]


def _failure(replicas: Sequence[Member], *, reasons: bool) -> str | None:
    found = next((replica.failure for replica in replicas if replica.failure is not None), None)
    return found if reasons or found is None else "not available"


_VLLM = """\
{model!r} is served by vLLM here, whose modules are others than those of transformers: from nnsight.modeling.vllm import VLLM; \
VLLM({model!r}).trace(…, remote=True)."""

_NOT_VLLM = """\
{model!r} is not served by vLLM here: LanguageModel({model!r}).trace(…, remote=True), or a server that was started with \
--engine vllm."""
