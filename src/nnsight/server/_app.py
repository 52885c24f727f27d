"""The HTTP service: what clients may ask of a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from ..errors import NNsightError, ProtocolError
from ..protocol import ENDED, JobState, ModelInfo, Person, Refusal, ServerInfo, read_job, versions
from ._keys import Keys, UnknownKeyError
from ._limits import Limits
from ._news import News
from ._queue import Queue, TooManyJobsError, UnknownJobError
from ._replica import Replica

T = TypeVar("T")
_LONGEST_WAIT = 30.0
_CODES: dict[type[NNsightError], int] = {
    UnknownKeyError: 401,
    UnknownJobError: 404,
    TooManyJobsError: 429,
    ProtocolError: 400,
}


class TooLargeError(NNsightError):
    """A body has more bytes than a job may have."""


class UnknownModelError(NNsightError):
    """A model that is not served here."""


_CODES |= {TooLargeError: 413, UnknownModelError: 404}


class Service:
    """What the routes share."""

    def __init__(
        self, queue: Queue, replicas: Sequence[Replica], keys: Keys, limits: Limits, news: News, *, trusted: bool
    ) -> None:
        self.queue = queue
        self.replicas = replicas
        self.keys = keys
        self.limits = limits
        self.news = news
        self.trusted = trusted
        self.draining = False

    def info(self) -> ServerInfo:
        """What is served."""
        waiting = self.queue.counts()
        models = [
            ModelInfo(
                name=replica.model.partition("@")[0],
                revision=replica.model.partition("@")[2] or None,
                running=replica.ready.is_set(),
                queued=waiting.get(replica.model, 0),
            )
            for replica in self.replicas
        ]
        return ServerInfo(versions(), models, self.trusted, self.limits.public())

    def submit(self, owner: str, idempotency: str, body: bytes) -> JobState:
        """Take a job in."""
        job, _ = read_job(body)
        model = job.model if job.revision is None else f"{job.model}@{job.revision}"
        served = [replica.model for replica in self.replicas]
        if model not in served:
            raise UnknownModelError(f"The model {model!r} is not served here; served are: {', '.join(served)}.")
        if not 0 < job.timeout < float("inf"):
            raise ProtocolError("the timeout of a job is a positive number of seconds")
        found = self.queue.submit(owner, idempotency, model, body, job.timeout)
        return self.queue.state(owner, found, 0)


def make_app(service: Service) -> FastAPI:
    """The application for a service."""
    app = FastAPI(title="nnsight", docs_url=None, redoc_url=None)
    app.state.service = service

    async def owner(request: Request) -> str:
        return await run_in_threadpool(service.keys.owner, request.headers.get("Authorization", ""))

    @app.exception_handler(NNsightError)
    async def refuse(_request: Request, error: NNsightError) -> Response:
        code = _CODES.get(type(error), 500)
        headers = {"Retry-After": "2"} if code == 429 else {}
        return _json(Refusal(str(error)), code, headers)

    @app.get("/v1/status")
    async def status() -> Response:
        return _json(await run_in_threadpool(service.info))

    @app.get("/v1/whoami")
    async def whoami(request: Request) -> Response:
        return _json(Person(await owner(request)))

    @app.post("/v1/jobs")
    async def submit(request: Request) -> Response:
        user = await owner(request)
        if service.draining:
            return _json(Refusal("The server is shutting down."), 503, {"Retry-After": "5"})
        body = await _body(request, service.limits.body)
        key = request.headers.get("Idempotency-Key", "")
        if not 8 <= len(key) <= 200:
            raise ProtocolError("a job needs an Idempotency-Key of 8 to 200 characters")
        return _json(await run_in_threadpool(service.submit, user, key, body), 202)

    @app.get("/v1/jobs/{job}")
    async def state(request: Request, job: str, after: int = 0, wait: float = 0.0, known: str = "") -> Response:
        user = await owner(request)
        return _json(await _next_state(service, user, job, after, known, min(wait, _LONGEST_WAIT)))

    @app.get("/v1/jobs/{job}/result")
    async def result(request: Request, job: str) -> Response:
        found = await run_in_threadpool(service.queue.answer, await owner(request), job)
        return Response(found, media_type="application/octet-stream")

    @app.delete("/v1/jobs/{job}")
    async def cancel(request: Request, job: str) -> Response:
        await run_in_threadpool(service.queue.cancel, await owner(request), job)
        return Response(status_code=204)

    return app


async def _next_state(service: Service, owner: str, job: str, after: int, known: str, wait: float) -> JobState:
    """The state of a job, as soon as it is another than the known one, or `wait` seconds have passed."""
    look: Callable[[], Any] = lambda: service.queue.state(owner, job, after)  # noqa: E731
    changed = service.news.expect(job)
    try:
        first = await run_in_threadpool(look)
        if wait <= 0 or first.events or first.status in ENDED or (known and first.status != known):
            return first
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(changed.wait(), wait)
        return await run_in_threadpool(look)
    finally:
        service.news.forget(job, changed)


async def _body(request: Request, limit: int) -> bytes:
    size = request.headers.get("Content-Length", "0")
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise ProtocolError("a job is sent as it is, not compressed")
    body = bytearray()
    if not size.isdigit() or int(size) > limit:
        raise TooLargeError(f"A job has at most {limit} bytes here; this one has {size}.")
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise TooLargeError(f"A job has at most {limit} bytes here.")
    return bytes(body)


def _json(value: Any, code: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), code, headers, "application/json")
