"""RemoteJob: a job that was sent, while it waits, runs and ends."""

from __future__ import annotations

import asyncio
import builtins
import queue
import uuid
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import msgspec

from .. import errors
from ..errors import JobCancelledError, NNsightError, RemoteTimeoutError, ServerError
from ..protocol import ENDED, Event, JobState
from . import _loop
from ._progress import Progress
from ._transport import Connection

_FIRST_WAIT = 0.5  # seconds that the server may take to end a job before it says that it has it
_POLL = 20  # seconds that the server may hold a question back until there is news
_state = msgspec.json.Decoder(JobState)


class RemoteJob:
    """A job on a server.

    `make` turns the answer's bytes into what `result()` gives.  `queue` collects events for a thread that waits;
    without it they are shown as they come.
    """

    def __init__(
        self,
        connection: Connection,
        frame: bytes,
        timeout: float,
        make: Callable[[bytes | memoryview], Any],
        *,
        waits: bool,
    ) -> None:
        self._connection = connection
        self._timeout = timeout
        self._make = make
        self._events: queue.SimpleQueue[Event | None] | None = queue.SimpleQueue() if waits else None
        self._state: JobState | None = None
        self._progress = Progress()
        self._outcome: Any = None
        self._made = False
        self._to_end = False
        self._future: Future[bytes | memoryview] = _loop.start(self._run(frame))

    @property
    def id(self) -> str | None:
        """The server's name for it, None before it has one."""
        return self._state.id if self._state is not None else None

    @property
    def status(self) -> str:
        """`sending`, `queued`, `running`, `done`, `failed` or `cancelled`."""
        return self._state.status if self._state is not None else "sending"

    def cancel(self) -> None:
        """End the job; `result()` raises `JobCancelledError` then, unless it was done already."""
        self._to_end = True  # where the server is still being told of it
        if self._state is not None and self._state.status not in ENDED:
            _loop.start(self._connection.request("DELETE", f"/v1/jobs/{self._state.id}")).result(30)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end, and give what was saved; an error of the block is raised here.

        Raises:
            RemoteTimeoutError: `timeout` seconds, or those of the job, have passed.
            JobCancelledError: It was cancelled.
            ServerError: The server cannot be reached, or lost the job.
        """
        if self._made:
            return self._outcome
        try:
            frame = self._future.result(timeout)
        except NNsightError as error:
            raise error.with_traceback(None) from None
        except (FutureTimeoutError, TimeoutError):
            raise RemoteTimeoutError(f"The job is still {self.status} after {timeout} seconds.") from None
        except CancelledError:
            raise JobCancelledError("The job was cancelled.") from None
        self._outcome, self._made = self._make(frame), True
        return self._outcome

    def wait(self) -> Any:
        """As `result()`, showing events in this thread as they come; an interrupt cancels the job."""
        assert self._events is not None
        try:
            while (event := self._events.get()) is not None:
                _show(event)
            return self.result()
        except KeyboardInterrupt:
            self.cancel()
            raise
        except BaseException:
            if not self._future.done():  # a warning that is an error
                self.cancel()
            raise

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.wrap_future(self._future).__await__()
        return self.result()

    def __repr__(self) -> str:
        return f"<RemoteJob {self.id or ''} {self.status}>"

    # --- on the loop -----------------------------------------------------------------------------------------

    async def _run(self, frame: bytes) -> bytes | memoryview:
        try:
            return await asyncio.wait_for(self._watch(frame), self._timeout)
        except asyncio.TimeoutError:
            position = f"{self.status}, after {self._timeout:g} seconds"
            if self._state is not None:
                await self._connection.request("DELETE", f"/v1/jobs/{self._state.id}")
            raise RemoteTimeoutError(
                f"The job was {position}, and has been cancelled. Give it longer: timeout=…"
            ) from None
        finally:
            self._progress.close()
            if self._events is not None:
                self._events.put(None)

    async def _watch(self, frame: bytes) -> bytes | memoryview:
        headers = {"Idempotency-Key": uuid.uuid4().hex, "Content-Type": "application/octet-stream"}
        where = f"/v1/jobs?answer=1&wait={_FIRST_WAIT if self._events is not None else 0}"
        state, answer = self._note(await self._connection.request("POST", where, content=frame, headers=headers))
        if self._to_end:
            await self._connection.request("DELETE", f"/v1/jobs/{state.id}")
        while state.status not in ENDED:
            where = f"/v1/jobs/{state.id}?after={state.next_event}&known={state.status}&wait={_POLL}&answer=1"
            state, answer = self._note(await self._connection.request("GET", where, patient=True))
        if state.status == "cancelled":
            raise JobCancelledError(f"The job {state.id} was cancelled.")
        if state.status == "failed" and state.error is not None:
            raise ServerError(state.error.text)
        return answer or await self._connection.request("GET", f"/v1/jobs/{state.id}/result", patient=True)

    def _note(self, body: bytes) -> tuple[JobState, memoryview]:
        """Take in what the server says of the job: its state, and behind a line feed the answer of one that is done."""
        end = body.find(b"\n")
        told, answer = (body, b"") if end < 0 else (body[:end], memoryview(body)[end + 1 :])
        try:
            state = _state.decode(told)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ServerError(f"The server's answer cannot be read: {error}") from error
        self._state = state
        self._progress.show(state)
        for event in state.events:
            if self._events is not None:
                self._events.put(event)
            else:
                _show(event)
        return state, memoryview(answer)


def _show(event: Event) -> None:
    if event.kind == "print":
        print(event.text, end="", flush=True)
        return
    warnings.warn_explicit(event.text, _category(event.category), event.filename, event.line)


def _category(name: str) -> type[Warning]:
    """A built-in class of warnings, or one of nnsight's; anything else is a `UserWarning`."""
    module, _, cls = name.partition(":")
    home = {"builtins": builtins, "nnsight.errors": errors}.get(module)
    found = getattr(home, cls, None)
    return found if isinstance(found, type) and issubclass(found, Warning) else UserWarning
