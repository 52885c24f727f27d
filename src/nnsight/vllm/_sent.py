"""EngineTracer: a trace whose block is sent to the engine's worker, waited for, awaited or streamed."""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from .._capture import Block, Scope, skip_body
from ..errors import CaptureError
from ..remote import Order, RemoteTracer, bind_names, read_answer, show_failure
from ._handle import EngineJob, Piece

if TYPE_CHECKING:
    from ._model import VLLM


class EngineTracer(RemoteTracer):
    """A trace whose block runs in the engine's worker.

    `with` waits for its end where it stands, `async with` lets the event loop go on meanwhile.  With `blocking=False`, the
    tracer of a `with` is the handle of what was sent: `await` it for the saved values by name, or stream the tokens.

    Example:
        >>> from nnsight.modeling.vllm import VLLM                                  # doctest: +SKIP
        >>> model = VLLM("gpt2")                                                    # doctest: +SKIP
        >>> async def ask(prompt):                                                  # doctest: +SKIP
        ...     with model.trace(prompt, max_tokens=20, blocking=False) as tracer:
        ...         stream = model.resid_post[3].save()
        ...     async for piece in tracer.stream():
        ...         print(piece.text, end="")
        ...     return (await tracer)["stream"]
    """

    _kind = "a trace in an engine"

    def __init__(self, model: VLLM, order: Order, *, blocking: bool) -> None:
        super().__init__(None, order, blocking=blocking)  # pyright: ignore[reportArgumentType]
        self._model = model

    def stream(self) -> AsyncIterator[Piece]:
        """The tokens of all requests as they come: `(request, ids, text)`.

        An error is raised at its end; closing the iterator before that cancels the requests.

        Raises:
            InputError: The trace was not given `blocking=False`.
        """
        job: Any = self._sent()
        return job.stream()

    # --- waiting in a thread -------------------------------------------------------------------------------------

    def _send(self, block: Block, scope: Scope) -> None:
        if not self._blocking:
            self._begin(block, scope, _print)
            return
        events: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        job = self._begin(block, scope, events.put)
        job.on_end(lambda: events.put(None))
        try:
            while (text := events.get()) is not None:
                _print(text)
        except BaseException:
            job.cancel()
            raise
        bind_names(job.result(), block, scope)

    def _begin(self, block: Block, scope: Scope, show: Callable[[str], None]) -> EngineJob:
        written = self._write(block, scope)
        job = EngineJob(
            self._model._client.running(),
            written.frame,
            partial(read_answer, written=written),
            self._model.tokenizer,
            show,
            place=f"the block at line {block.line} of {os.path.basename(block.filename)}",
            streams=not self._blocking,
            confined=self._model._limits,
        )
        self._job = job  # pyright: ignore[reportAttributeAccessIssue]
        return job

    # --- waiting in an event loop --------------------------------------------------------------------------------

    def __aenter__(self) -> _Entering:
        if not self._blocking:
            raise CaptureError(
                "`async with` waits for the end: with blocking=False, write `with` and await the tracer."
            )
        frame = sys._getframe(1)
        self._take(frame, waits=True)
        return _Entering(self, frame)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not self._is_skipped(kind, error):
            return False
        del error, traceback
        block, scope = self._taken()
        try:
            bind_names(await self._begin(block, scope, _print), block, scope)
        except BaseException as failure:
            show_failure(failure)
            raise
        finally:
            self._let_go()
        return True


class _Entering:
    """What `async with` awaits: there is nothing to wait for, but only behind it can the body be skipped."""

    def __init__(self, tracer: EngineTracer, frame: FrameType) -> None:
        self._tracer = tracer
        self._frame: FrameType | None = frame

    def __await__(self) -> Iterator[Any]:
        return self

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        frame, self._frame = self._frame, None
        assert frame is not None
        stop = StopIteration(self._tracer)
        skip_body(frame)
        raise stop


def _print(text: str) -> None:
    print(text, end="", flush=True)
