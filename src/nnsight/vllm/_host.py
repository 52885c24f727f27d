"""Host: an engine as a server has it: started again when it has died, with jobs and completions beside each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from ..errors import EngineError
from ._client import Running
from ._handle import EngineJob
from ._model import VLLM
from ._openai import Completions

_GRACE = 10.0  # seconds that a worker may take to answer, when a job was to end


class Host:
    """The engine of one served model.

    Args:
        name: The model, as `VLLM` takes it.
        public: The name by which completions ask for it.
        options: The engine's arguments.
        confined: The limits of blocks in processes of their own; None runs them in the worker itself.
    """

    def __init__(
        self, name: str, public: str, options: Mapping[str, Any], *, confined: dict[str, float] | None
    ) -> None:
        self._name = name
        self._public = public
        self._options = dict(options)
        self._confined = confined
        self._model: VLLM | None = None
        self._running: Running | None = None
        self._completions: Completions | None = None
        self._asked: tuple[float, Future[Any]] | None = None

    def start(self) -> None:
        """Start the engine where none runs.

        Raises:
            Exception: It cannot be started; vLLM has many classes for that.
        """
        if self._running is not None and self._running.death is None:
            return
        if self._model is None:
            self._model = VLLM(self._name, **self._options)
            _ = self._model.tokenizer
        self._completions = self._asked = None
        self._model.dispatch()
        running = self._model._client.running()
        self._completions = Completions(running, self._public)
        self._running = running

    @property
    def death(self) -> str | None:
        """How the engine has ended; None while it runs."""
        return "it was not started" if self._running is None else self._running.how

    @property
    def slots(self) -> int:
        """How many requests the engine computes at a time."""
        assert self._running is not None
        return self._running.most_requests

    @property
    def completions(self) -> Completions | None:
        """The service of completions, while the engine runs."""
        return self._completions if self.death is None else None

    def begin(self, frame: bytes, show: Callable[[str], None]) -> EngineJob:
        """Begin a job; its result are the bytes of the answer.

        Raises:
            EngineError: The engine has died.
        """
        if self._model is None or self._running is None or self._running.death is not None:
            raise EngineError("The engine does not run.")
        return EngineJob(
            self._running,
            frame,
            _as_it_is,
            self._model.tokenizer,
            show,
            place="a job of a server",
            streams=False,
            confined=self._confined,
        )

    # --- jobs that do not end ------------------------------------------------------------------------------------

    def expect_answer(self) -> None:
        """A job was told to end: the worker, which runs its block, must answer soon."""
        if self._asked is None and self._running is not None and self._running.death is None:
            question = self._running.call(self._running.ask("nnsight_living"))
            self._asked = time.monotonic() + _GRACE, question

    def check(self) -> None:
        """Kill the engine where a block holds its worker up and does not end."""
        if self._asked is None:
            return
        deadline, question = self._asked
        if question.done():
            self._asked = None
        elif time.monotonic() > deadline and self._running is not None:
            self._asked = None
            self._running.kill()

    def close(self) -> None:
        """End the engine."""
        if self._model is not None:
            self._model.close()


def _as_it_is(frame: bytes) -> bytes:
    return frame
