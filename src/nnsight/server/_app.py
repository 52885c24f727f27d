"""The HTTP service: what clients may ask of a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from sqlalchemy.exc import OperationalError

from ..errors import LoadError, NNsightError, ProtocolError
from ..protocol import ENDED, JobState, ModelOrder, Person, Refusal
from ._budget import BudgetError
from ._completions import Desk, UnavailableError
from ._describe import describe, responses
from ._fleet import ServedError, UnknownModelError, WrongEngineError
from ._keys import NotAdminError, UnknownKeyError, User
from ._monitor import log
from ._page import HEADERS, page
from ._queue import TooManyJobsError, TooMuchStoredError, UnknownJobError
from ._service import Service

_LONGEST_WAIT = 30.0
_PIECE = 2**20  # bytes that are sent at a time


class TooLargeError(NNsightError):
    """A body has more bytes than a job may have."""


class ClosingError(NNsightError):
    """The server is about to end."""


# The code of each refusal, and after how many seconds asking again may help.
_CODES: dict[type[NNsightError], tuple[int, int | None]] = {
    ProtocolError: (400, None),
    UnknownKeyError: (401, None),
    NotAdminError: (403, None),
    UnknownJobError: (404, None),
    UnknownModelError: (404, None),
    ServedError: (409, None),
    BudgetError: (409, None),
    LoadError: (400, None),
    WrongEngineError: (409, None),
    UnavailableError: (503, 5),
    TooLargeError: (413, None),
    TooMuchStoredError: (413, 30),
    TooManyJobsError: (429, 2),
    ClosingError: (503, 5),
}


def make_app(service: Service) -> FastAPI:
    """The application for a service."""
    app = FastAPI(title="nnsight", docs_url=None, redoc_url=None)
    app.state.service = service
    app.openapi = lambda: describe(app)
    _add_refusals(app, service)
    _add_questions(app, service)
    _add_jobs(app, service)
    _add_models(app, service)
    if service.fleet.engine:
        _add_completions(app, service)
    return app


def _add_refusals(app: FastAPI, service: Service) -> None:
    def refuse(request: Request, error: Exception, code: int, again: int | None, reason: str) -> Response:
        service.monitor.refused(code, request.method, request.url.path, type(error).__name__)
        return _json(Refusal(reason), code, {"Retry-After": str(again)} if again is not None else {})

    @app.exception_handler(NNsightError)
    async def refused(request: Request, error: NNsightError) -> Response:
        code, again = _CODES.get(type(error), (500, None))
        return refuse(request, error, code, again, str(error))

    async def ill(request: Request, error: Exception) -> Response:
        log.error("store out of order", extra={"error": type(error).__name__, "number": getattr(error, "errno", None)})
        return refuse(request, error, 503, 5, "The server cannot keep its jobs at the moment.")

    app.add_exception_handler(OperationalError, ill)  # the database is locked
    app.add_exception_handler(OSError, ill)  # the disk is full


def _user(service: Service, request: Request) -> User:
    return service.keys.user(request.headers.get("Authorization", ""))


def _add_questions(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def overview() -> Response:
        info = await run_in_threadpool(service.info, None)
        return Response(page(info, draining=service.draining), headers=HEADERS, media_type="text/html")

    @app.get("/metrics", summary="Numbers for Prometheus", responses=responses("text/plain"))
    async def metrics() -> Response:
        return Response(await run_in_threadpool(service.monitor.text), media_type="text/plain; version=0.0.4")

    @app.get("/v1/status", summary="What is served", responses=responses("ServerInfo"))
    async def status(request: Request) -> Response:
        user: User | None = None
        with suppress(UnknownKeyError):
            user = _user(service, request)
        return _json(await run_in_threadpool(service.info, user))

    @app.get("/v1/whoami", summary="Whose key this is", responses=responses("Person", 401))
    async def whoami(request: Request) -> Response:
        return _json(Person(_user(service, request).name))


def _add_jobs(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/jobs",
        status_code=202,
        summary="Send a job",
        description="The body is a frame of the protocol; the same Idempotency-Key is the same job. The answer comes at "
        "once, or with `wait` when the job has ended or so many seconds have passed. With `answer`, what a job that is "
        "done has left follows its state, behind a line feed.",
        responses=responses("JobState", 400, 401, 404, 413, 429, 503, code=202),
        openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": {}}}},
    )
    async def submit(request: Request, wait: float = 0.0, answer: bool = False) -> Response:
        user = _user(service, request)
        if service.draining:
            raise ClosingError("The server is shutting down.")
        body = await _body(request, service.limits.body)
        key = request.headers.get("Idempotency-Key", "")
        if not 8 <= len(key) <= 200:
            raise ProtocolError("a job needs an Idempotency-Key of 8 to 200 characters")
        job = await run_in_threadpool(service.submit, user, key, body)
        state = await _end_of(service, user.name, job, min(wait, _LONGEST_WAIT))
        return await _told(service, state, 202, answer=answer)

    @app.get("/v1/jobs", summary="Your jobs", responses=responses("JobList", 401))
    async def jobs(request: Request) -> Response:
        return _json(await run_in_threadpool(service.jobs, _user(service, request)))

    @app.get(
        "/v1/jobs/{job}",
        summary="Where a job of yours stands",
        description="With `wait` seconds, the state comes when the status is no longer `known`, or there are events. With "
        "`answer`, what a job that is done has left follows its state, behind a line feed.",
        responses=responses("JobState", 401, 404),
    )
    async def state(
        request: Request, job: str, after: int = 0, wait: float = 0.0, known: str = "", answer: bool = False
    ) -> Response:
        user = _user(service, request)
        found = await _next_state(service, user.name, job, after, known, min(wait, _LONGEST_WAIT))
        return await _told(service, found, 200, answer=answer)

    @app.get(
        "/v1/jobs/{job}/result",
        summary="What a job of yours has left",
        responses=responses("application/octet-stream", 401, 404),
    )
    async def result(request: Request, job: str) -> Response:
        found = await run_in_threadpool(service.queue.answer, _user(service, request).name, job)
        return Response(found, media_type="application/octet-stream")

    @app.delete(
        "/v1/jobs/{job}", status_code=204, summary="End a job of yours", responses=responses(None, 401, 404, code=204)
    )
    async def cancel(request: Request, job: str) -> Response:
        await run_in_threadpool(service.queue.cancel, _user(service, request).name, job)
        return Response(status_code=204)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/models",
        status_code=202,
        summary="Serve another model (administrators)",
        responses=responses("ServerInfo", 400, 401, 403, 409, code=202),
        openapi_extra={"requestBody": {"required": True, "content": _content("ModelOrder")}},
    )
    async def deploy(request: Request) -> Response:
        user = _user(service, request)
        order = _order(await _body(request, 10_000))
        await run_in_threadpool(service.deploy, user, order.model)
        return _json(await run_in_threadpool(service.info, user), 202)

    @app.delete(
        "/v1/models/{model:path}",
        status_code=204,
        summary="Serve a model no longer (administrators)",
        responses=responses(None, 401, 403, 404, code=204),
    )
    async def evict(request: Request, model: str) -> Response:
        await run_in_threadpool(service.evict, _user(service, request), model)
        return Response(status_code=204)


def _add_completions(app: FastAPI, service: Service) -> None:
    app.state.desk = desk = Desk(service)

    @app.get(
        "/v1/models", summary="The models, as OpenAI's clients ask for them", responses=responses("text/plain", 401)
    )
    async def models(request: Request) -> Response:
        _user(service, request)
        card = {"object": "model", "created": int(service.started), "owned_by": "nnsight"}
        return _json({"object": "list", "data": [{"id": name, **card} for name in service.fleet.names()]})

    async def complete(request: Request) -> Response:
        user = _user(service, request)
        if service.draining:
            raise ClosingError("The server is shutting down.")
        return desk.take(user.name, request.url.path, await _body(request, service.limits.body))

    for path in ("/v1/completions", "/v1/chat/completions"):
        app.post(
            path,
            summary="A completion as OpenAI has them, by vLLM's own service",
            responses=responses("text/event-stream", 400, 401, 404, 413, 429, 503),
            openapi_extra={"requestBody": {"required": True, "content": {"application/json": {}}}},
        )(complete)


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _order(body: bytes) -> ModelOrder:
    try:
        return msgspec.json.decode(body, type=ModelOrder)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the body does not name a model: {error}") from error


async def _told(service: Service, state: JobState, code: int, *, answer: bool) -> Response:
    """A state, with the `answer` of a job that is done behind it where that was asked for."""
    if not answer or state.status != "done":
        return _json(state, code)
    left = await run_in_threadpool(service.queue.kept, state.id)
    head = msgspec.json.encode(state) + b"\n"
    if len(left) <= _PIECE:
        return Response(head + left, code, media_type="application/octet-stream")
    size = {"Content-Length": str(len(head) + len(left))}
    return StreamingResponse(_pieces(head, left), code, size, "application/octet-stream")


async def _pieces(head: bytes, left: bytes) -> AsyncIterator[bytes]:
    yield head
    for at in range(0, len(left), _PIECE):
        yield left[at : at + _PIECE]


async def _end_of(service: Service, owner: str, job: str, wait: float) -> JobState:
    """The state of a job when it has ended, or as it is after `wait` seconds."""
    deadline = asyncio.get_running_loop().time() + wait
    while True:
        changed = service.news.expect(job, end=True)
        try:
            state = await run_in_threadpool(service.queue.state, owner, job, 0)
            left = deadline - asyncio.get_running_loop().time()
            if state.status in ENDED or left <= 0:
                return state
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), left)
        finally:
            service.news.forget(job, changed)


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
        raise ProtocolError("a body is sent as it is, not compressed")
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
