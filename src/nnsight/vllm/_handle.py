"""EngineJob: a block that was sent to the engine's worker, while the engine computes its requests."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, NamedTuple

from ..errors import EngineError, InputError, JobCancelledError, NNsightError, RemoteTimeoutError
from ._client import Running
from ._messages import Ask
from ._requests import check_length, prompt_of, sampling_of


class Piece(NamedTuple):
    """What came of one request at a time: `request` counts those of the trace in the order they were asked for."""

    request: int
    ids: list[int]
    text: str


class EngineJob:
    """A job of an engine.

    `make` turns the answer's bytes into what `result()` gives, `show` is given what the block prints, `place` says where
    the block stands.  With `streams`, tokens are kept for `stream()` as they come; `confined` are the limits of a block in
    a process of its own.
    """

    def __init__(
        self,
        running: Running,
        frame: bytes,
        make: Callable[[bytes], Any],
        tokenizer: Any,
        show: Callable[[str], None],
        *,
        place: str,
        streams: bool,
        confined: dict[str, float] | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self._running = running
        self._frame = frame
        self._confined = confined
        self._make = make
        self._tokenizer = tokenizer
        self._show = show
        self._place = place
        self._streams = streams
        self._begin = (self.id, frame, True) if confined else (self.id, frame)
        self._count = 0
        self._pieces: list[Piece] = []
        self._news = asyncio.Event()
        self._over = self._cancelled = self._made = False
        self._outcome: Any = None
        self._future = running.submit(self._run())

    @property
    def status(self) -> str:
        """`running`, `done`, `failed` or `cancelled`."""
        if not self._future.done():
            return "running"
        if self._future.cancelled():
            return "cancelled"
        return "failed" if self._future.exception() is not None else "done"

    def cancel(self) -> None:
        """Take its requests out of the engine, and its block out of the worker."""
        self._cancelled = self._future.cancel() or self._cancelled

    def on_end(self, call: Callable[[], None]) -> None:
        """Call this when it is over."""
        self._future.add_done_callback(lambda _: call())

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end, and give what was saved; an error of the block is raised here.

        Raises:
            RemoteTimeoutError: `timeout` seconds have passed.
            JobCancelledError: It was cancelled.
            EngineError: The engine has died.
        """
        if self._made:
            return self._outcome
        try:
            frame = self._future.result(timeout)
        except EngineError as error:
            raise EngineError(f"{error} It was computing {self._place}.") from None
        except NNsightError as error:
            raise error.with_traceback(None) from None
        except CancelledError:
            raise JobCancelledError(f"The job of {self._place} was cancelled.") from None
        except (FutureTimeoutError, TimeoutError):
            raise RemoteTimeoutError(f"The job is still {self.status} after {timeout} seconds.") from None
        self._outcome, self._made = self._make(frame), True
        return self._outcome

    def __await__(self) -> Generator[Any, None, Any]:
        future = asyncio.wrap_future(self._future)
        try:
            yield from asyncio.wait([future]).__await__()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if not future.cancelled():
            future.exception()  # taken note of: result() raises it
        return self.result()

    async def stream(self) -> AsyncIterator[Piece]:
        """Tokens as they come; closing the iterator before its end cancels the job."""
        if not self._streams:
            raise InputError("Tokens are kept for stream() where the trace was given blocking=False.")
        seen, over = 0, False
        try:
            while not over:
                pieces, over = await asyncio.wrap_future(self._running.call(self._more(seen)))
                seen += len(pieces)
                for piece in pieces:
                    yield piece
        except (asyncio.CancelledError, GeneratorExit):
            self.cancel()
            raise
        await self

    def __repr__(self) -> str:
        return f"<EngineJob {self.id} {self.status}>"

    # --- on the engine's loop ------------------------------------------------------------------------------------

    async def _run(self) -> bytes:
        running, answered = self._running, False
        try:
            reply = await running.tell("nnsight_begin", self.id, self._frame, self._confined)
            self._print(reply.printed)
            while reply.answer is None:
                if not reply.asks:
                    raise EngineError("The worker waits for something that cannot come.")
                results = await asyncio.gather(*map(self._compute, reply.asks))
                reply = await running.tell("nnsight_go_on", self.id, results)
                self._print(reply.printed)
            answered = True
            return reply.answer
        finally:
            self._over = True
            self._news.set()
            if not answered and running.death is None:
                await asyncio.shield(running.ask("nnsight_end", self.id))

    def _print(self, texts: list[str]) -> None:
        for text in texts:
            self._show(text)

    async def _compute(self, ask: Ask) -> Any:
        """The ids of prompt and continuation, or a text that says why there are none."""
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.exceptions import EngineDeadError  # pyright: ignore[reportMissingImports]

        number, self._count = self._count, self._count + 1
        try:
            prompt = ask.salted(prompt_of(ask.prompt, self._tokenizer))
            params = sampling_of(ask.params, ask.extra())
            if ask.attended:
                check_length(prompt, self._running.step_tokens)
            params.output_kind = RequestOutputKind.DELTA if self._streams else RequestOutputKind.FINAL_ONLY
            ids: list[int] = []
            async for output in self._running.outputs(prompt, params, ask.key):
                ids += output.outputs[0].token_ids
                if self._streams:
                    self._add(Piece(number, list(output.outputs[0].token_ids), output.outputs[0].text))
        except EngineDeadError:
            raise
        except Exception as error:  # of this request, whose block is told of it
            return str(error.__cause__ or error) or type(error).__name__
        return [prompt["prompt_token_ids"], ids]

    def _add(self, piece: Piece) -> None:
        if piece.ids or piece.text:
            self._pieces.append(piece)
            self._news.set()

    async def _more(self, seen: int) -> tuple[list[Piece], bool]:
        """The pieces since the first `seen`, and whether they are the last."""
        while len(self._pieces) == seen and not self._over:
            self._news.clear()
            await self._news.wait()
        return self._pieces[seen:], self._over
