"""Invoke: one input of a batch, with a deferred block that sees its rows only."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .._capture import Block, Scope, capture, is_skip, skip_body
from ..errors import CaptureError
from ._given import Given

if TYPE_CHECKING:
    from ._tracer import Tracer


class Invoke:
    """The context that `tracer.invoke(...)` gives."""

    def __init__(self, tracer: Tracer, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tracer = tracer
        self._inputs = inputs
        self._kwargs = kwargs
        self._block: Block | None = None
        self._scope: Scope | None = None
        self._line = 0

    def __enter__(self) -> Invoke:
        self._tracer._begin_invoke(self, has_input=bool(self._inputs or self._kwargs))
        frame = sys._getframe(1)
        self._block = capture(frame)
        self._scope = Scope(frame)
        self._line = self._block.line
        skip_body(frame)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not is_skip(kind):
            if error is None:
                raise CaptureError("The body of an invoke was run where it stands, not deferred: it cannot be traced.")
            return False
        assert self._block is not None
        assert self._scope is not None
        given = Given(self._inputs, self._kwargs) if self._inputs or self._kwargs else None
        self._tracer._add_invoke(self._block, self._scope, given, self._line)
        self._block = self._scope = None
        return True
