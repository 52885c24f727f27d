"""One event loop on a thread of its own, on which all requests of this process run."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: tuple[int, asyncio.AbstractEventLoop] | None = None


def start(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Begin `work` on the loop; blocking callers wait for the future, others await it."""
    return asyncio.run_coroutine_threadsafe(work, _running_loop())


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None or _loop[0] != os.getpid():  # a forked process has the loop, not its thread
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="nnsight-remote", daemon=True).start()
            _loop = (os.getpid(), loop)
        return _loop[1]
