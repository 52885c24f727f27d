"""RemoteTracer: what `model.trace(..., remote=True)` gives: the block is taken from its frame, sent, and run elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Generator
from types import FrameType, TracebackType
from typing import Any

from .._capture import Block, Scope, bind, capture, forget_skip, is_skip, skip_body
from .._core import trim
from ..errors import CaptureError, NotTracingError
from ._apply import bind_names, read_answer, saved_only
from ._check import check_saved
from ._handle import RemoteJob
from ._job import JobWriter, Order, Written
from ._transport import Connection


class RemoteTracer:
    """One remote block; with `blocking=False` it is the job's handle afterwards.

    Example:
        >>> from nnsight import LanguageModel
        >>> model = LanguageModel("nnsight/landmarks")
        >>> with model.trace("Hello", backend="local-process", blocking=False) as job:
        ...     hidden = model.transformer.h[0].output.save()
        >>> job.result()["hidden"].shape[-1] == model.config.n_embd
        True
        >>> job.status
        'done'
    """

    _kind = "a remote trace"  # in messages

    def __init__(self, connection: Connection, order: Order, *, blocking: bool) -> None:
        self._connection = connection
        self._order = order
        self._blocking = blocking
        self._block: Block | None = None
        self._scope: Scope | None = None
        self._job: RemoteJob | None = None

    def __enter__(self) -> RemoteTracer:
        frame = sys._getframe(1)
        self._take(frame)
        skip_body(frame)
        return self

    def _take(self, frame: FrameType, *, waits: bool = False) -> None:
        """Take the block from the frame that it stands in; it `waits` in an `async with`."""
        if self._job is not None or self._block is not None:
            raise NotTracingError("A tracer can be entered once: call model.trace(...) again.")
        self._block = capture(frame, waits=waits)
        self._scope = Scope(frame)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not self._is_skipped(kind, error):
            return False
        del error, traceback
        try:
            self._send(*self._taken())
        except BaseException as failure:
            show_failure(failure)
            raise
        finally:
            self._let_go()
        return True

    def _is_skipped(self, kind: type[BaseException] | None, error: BaseException | None) -> bool:
        """Whether the body was skipped; if not, something else has gone wrong, or nothing was sent."""
        if is_skip(kind):
            return True
        if error is None:
            raise CaptureError(f"The body of {self._kind} was run where it stands, not sent.")
        return False

    def _taken(self) -> tuple[Block, Scope]:
        assert self._block is not None
        assert self._scope is not None
        return self._block, self._scope

    def _let_go(self) -> None:
        if self._scope is not None:
            self._scope.close()
            self._scope = None

    def _write(self, block: Block, scope: Scope) -> Written:
        """The job to send."""
        if self._blocking:
            check_saved(block)
        if block.target is not None:
            bind(block.only_target(), scope)(self)
            scope.write_back(block.target_names())
        return JobWriter(self._order).write(block, scope)

    def _send(self, block: Block, scope: Scope) -> None:
        written = self._write(block, scope)
        timeout = self._order.timeout
        job = RemoteJob(
            self._connection, written.frame, timeout, lambda frame: read_answer(frame, written), waits=self._blocking
        )
        self._job = job
        if self._blocking:
            bind_names(job.wait(), block, scope)

    # --- the job ---------------------------------------------------------------------------------------------

    @property
    def id(self) -> str | None:
        """The server's name for the job."""
        return self._sent().id

    @property
    def status(self) -> str:
        """`sending`, `queued`, `running`, `done`, `failed` or `cancelled`."""
        return self._sent().status

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the end, and give the saved values by name.

        Args:
            timeout: Seconds to wait at most; by default those of the job.

        Returns:
            What the block saved: `{"hidden": tensor}`.

        Raises:
            RemoteTimeoutError: That long has passed.
            JobCancelledError: The job was cancelled.
            ServerError: The server cannot be reached, or lost the job.
        """
        return saved_only(self._sent().result(timeout))

    def cancel(self) -> None:
        """End the job, whether it waits or runs."""
        self._sent().cancel()

    def __await__(self) -> Generator[Any, None, dict[str, Any]]:
        found = yield from self._sent().__await__()
        return saved_only(found)

    def _sent(self) -> RemoteJob:
        if self._job is None:
            raise NotTracingError("The job is sent when its `with` block ends; it can be asked about after that.")
        return self._job

    def __repr__(self) -> str:
        return repr(self._job) if self._job is not None else "<RemoteTracer, not sent>"


def show_failure(failure: BaseException) -> None:
    """Let an error be seen as the user's own code has met it."""
    forget_skip(failure)
    failure.__traceback__ = trim(failure.__traceback__)
