"""A server inside this process for one model, for `backend="local-process"`."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from ..modeling import LanguageModel, NNsight
from ..protocol import Shared
from ..sandbox import execute, execute_together
from ._app import make_app
from ._fleet import Fleet, ServedError
from ._keys import Keys
from ._limits import Limits
from ._monitor import Monitor
from ._news import News
from ._queue import Queue
from ._replica import Emit, Replica
from ._service import Service
from ._store import Store

KEY = "embedded"


class ThreadRunner:
    """Runs blocks on the replica's own thread, on a model object that is not the user's."""

    mixes_owners = True

    def __init__(self, model: NNsight) -> None:
        self._model = model

    def start(self) -> None:
        if isinstance(self._model, LanguageModel):
            self._model.dispatch()

    def rest(self) -> None:
        """The model stays: it is the only one."""

    def run(self, frame: bytes, emit: Emit, owner: str) -> bytes:
        return execute(frame, self._model, emit, forward_warnings=False)

    def run_together(self, frames: list[bytes], owners: list[str]) -> Shared:
        return execute_together(frames, self._model)

    def stop(self) -> None:
        """A thread cannot be ended from outside: the job runs to its end."""

    def close(self) -> None:
        pass


def embed(model: NNsight) -> FastAPI:
    """A server for `model` alone, which lives as long as the application that is returned."""
    folder = tempfile.TemporaryDirectory(prefix="nnsight-")
    limits, news, monitor = Limits(), News(), Monitor()
    store = Store(Path(folder.name))
    queue = Queue(store, limits, news, monitor)
    replica = Replica(KEY, ThreadRunner(_served(model)), queue, news, limits)

    def make(name: str) -> list[Replica]:
        if name != KEY:
            raise ServedError("A server inside a process serves one model.")
        return [replica]

    app = make_app(Service(queue, Fleet([KEY], make, queue), Keys(None), limits, news, monitor, trusted=True))
    replica.start()
    weakref.finalize(app, _close, replica, store, folder)
    return app


def _close(replica: Replica, store: Store, folder: tempfile.TemporaryDirectory[str]) -> None:
    replica.end(5)
    store.close()
    folder.cleanup()


def _served(model: NNsight) -> NNsight:
    if not isinstance(model, LanguageModel):
        return NNsight(model._model)
    source: Any = model._source
    if source is None:
        return LanguageModel(model._model, tokenizer=model._processor)
    return LanguageModel(source.name, **source.options)
