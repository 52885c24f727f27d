"""OpenAI-style completions beside jobs: whose they are, how many at a time, and which engine computes them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
from fastapi import Response

from ..errors import EngineError, ProtocolError
from ._engine import EngineReplica
from ._queue import TooManyJobsError
from ._service import Service

_OWN = "nnsight"  # the name among a request's `vllm_xargs` by which the worker knows blocks


class UnavailableError(EngineError):
    """The engine of a model does not run at the moment."""


class Head(msgspec.Struct):
    """What is read of a completion before vLLM reads it."""

    model: str = ""
    prompt: Any = None
    n: Any = 1
    vllm_xargs: Any = None

    @property
    def count(self) -> int:
        """How many sequences are to be computed."""
        several = isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], (str, list))
        copies = self.n if isinstance(self.n, int) else 1
        return max(copies, 1) * (len(self.prompt) if several else 1)


class Desk:
    """Takes completions in, and knows whose how many there are; all of it on the loop of the service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._open: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()

    def take(self, owner: str, path: str, body: bytes) -> Response:
        """The answer to a completion, which is computed when it is sent.

        Raises:
            ProtocolError: The body cannot be read, or asks for what is not to be had.
            UnknownModelError: The model is not served.
            UnavailableError: Its engine does not run at the moment.
            TooManyJobsError: The user has as many sequences as one may.
        """
        head = _head(body)
        fleet, most = self._service.fleet, self._service.limits.queued
        names = fleet.names()
        model = head.model or (names[0] if len(names) == 1 else "")
        member = next(iter(fleet.members(model)))
        assert isinstance(member, EngineReplica)
        engine = member.host.completions
        if engine is None:
            raise UnavailableError(f"The engine of {model!r} does not run at the moment; it is being started.")
        if head.count > most:
            raise ProtocolError(f"a request asks for {head.count} sequences; at most {most} are one user's at a time")
        if self._open[owner] + head.count > most:
            raise TooManyJobsError(
                f"You have {self._open[owner]} sequences of completions under way and ask for {head.count}; at most {most} are "
                "one user's at a time."
            )
        self._service.monitor.completed(model, head.count)

        async def work(receive: Any, send: Any) -> None:
            await asyncio.wait_for(engine.answer(path, body, receive, send), self._service.limits.seconds)

        return _Completion(work, lambda change: self._note(owner, change * head.count))

    def _note(self, owner: str, change: int) -> None:
        self._open[owner] += change
        if self._open[owner] <= 0:
            del self._open[owner]
        (self._idle.clear if self._open else self._idle.set)()

    async def wait(self, seconds: float) -> None:
        """Until those that are under way have ended."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)


class _Completion(Response):
    """An answer that an engine gives."""

    def __init__(self, work: Callable[[Any, Any], Any], note: Callable[[int], None]) -> None:
        super().__init__()
        self._work = work
        self._change = note

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = ""

        async def watched(message: Any) -> None:
            nonlocal kind
            if message["type"] == "http.response.start":
                kind = dict(message["headers"]).get(b"content-type", b"?").decode()
            await send(message)

        self._change(1)
        try:
            await self._work(receive, watched)
        except (EngineError, asyncio.TimeoutError) as error:
            late = isinstance(error, asyncio.TimeoutError)
            reason = "It took longer than one may." if late else "The engine died while it computed this."
            text = msgspec.json.encode({"error": {"message": reason, "type": type(error).__name__, "code": 503}})
            if not kind:
                await Response(text, 503, {"Retry-After": "30"}, "application/json")(scope, receive, send)
            elif kind.startswith("text/event-stream"):
                await send({"type": "http.response.body", "body": b"data: " + text + b"\n\n", "more_body": False})
            else:
                raise
        finally:
            self._change(-1)


def _head(body: bytes) -> Head:
    try:
        head = msgspec.json.decode(body, type=Head)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the body is no request of a completion: {error}") from error
    if isinstance(head.vllm_xargs, dict) and _OWN in head.vllm_xargs:
        raise ProtocolError(f"vllm_xargs has {_OWN!r}, by which the server knows its jobs")
    return head
