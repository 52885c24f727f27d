"""A server inside this process for one model, for `backend="local-process"`."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from ..modeling import LanguageModel, NNsight
from ..sandbox import execute
from ._app import Service, make_app
from ._keys import Keys
from ._limits import Limits
from ._news import News
from ._queue import Queue
from ._replica import Emit, Replica
from ._store import Store

KEY = "embedded"


class ThreadRunner:
    """Runs blocks on the replica's own thread, on a model object that is not the user's."""

    def __init__(self, model: NNsight) -> None:
        self._model = model

    def start(self) -> None:
        if isinstance(self._model, LanguageModel):
            self._model.dispatch()

    def run(self, frame: bytes, emit: Emit) -> bytes:
        return execute(frame, self._model, emit, forward_warnings=False)

    def stop(self) -> None:
        """A thread cannot be ended from outside: the job runs to its end."""

    def close(self) -> None:
        pass


def embed(model: NNsight) -> FastAPI:
    """A server for `model` alone, which lives as long as the application that is returned."""
    folder = tempfile.TemporaryDirectory(prefix="nnsight-")
    limits, news = Limits(), News()
    store = Store(Path(folder.name))
    queue = Queue(store, limits, news)
    replica = Replica(KEY, ThreadRunner(_served(model)), queue, news, limits)
    app = make_app(Service(queue, [replica], Keys(None), limits, news, trusted=True))
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
