"""Skipping the body of a with-statement that is being entered.

CPython calls a frame's trace function between two instructions, and lets an exception that it raises
propagate in the frame. The one installed here does so at the first instruction after `__enter__` returned,
where the with-statement is already there to catch it. CPython then removes the trace function, which thereby
dies, and its end puts back what it had displaced, before `__exit__` is called.
"""

import sys
from collections.abc import Callable
from dis import opname
from types import FrameType
from typing import Any

Tracer = Callable[[FrameType, str, Any], Any]


class _Skip(BaseException):
    """Leads from the start of a body to `__exit__`."""


def skip_body(frame: FrameType) -> None:
    """Make the with-statement that `frame` is entering call `__exit__` in place of running its body.

    Call it last in `__enter__`: a debugger or coverage tracer misses the calls made from there on. It is in
    its place again when `__exit__` is called. `is_skip` recognises the exception that `__exit__` gets and
    must swallow; where it gets no exception at all, the body was run where it stands.
    """
    displaced = sys.gettrace()
    if type(displaced).__name__ == "CTracer":
        _report_returns(displaced, sys._getframe(), frame)
    shot = _Shot()
    shot.frame, shot.displaced, shot.local = frame, displaced, frame.f_trace
    shot.lines, shot.opcodes = frame.f_trace_lines, frame.f_trace_opcodes
    frame.f_trace = shot
    del shot  # a debugger may hold on to this frame
    frame.f_trace_opcodes = True
    sys.settrace(_ignore)


def is_skip(exc_type: type[BaseException] | None) -> bool:
    """Whether `__exit__` was called because `skip_body` skipped the body."""
    return exc_type is not None and issubclass(exc_type, _Skip)


def forget_skip(error: BaseException) -> None:
    """Take the skip out of what an exception was raised during; `__exit__` runs during the skip."""
    while error.__context__ is not None:
        if isinstance(error.__context__, _Skip):
            error.__context__ = None
            return
        error = error.__context__


def _ignore(frame: FrameType, event: str, arg: object) -> None:
    return None


def _report_returns(tracer: Any, inner: FrameType, outer: FrameType) -> None:
    """Let coverage's tracer, which keeps a stack of the calls it saw, see these frames return."""
    frame: FrameType | None = inner
    while frame is not None and frame is not outer:
        if frame.f_trace is None:
            frame.f_trace = tracer
        frame = frame.f_back


# They end the awaiting of `__aenter__`, where the statement does not catch exceptions yet.
_STILL_OUTSIDE = ("END_SEND", "SETUP_ASYNC_WITH")


class _Shot:
    """The trace function of the frame. Nothing else may refer to it: its end is what restores the tracers."""

    __slots__ = ("displaced", "frame", "lines", "local", "opcodes")

    # Set from outside, not in `__init__`, whose frame a debugger may hold on to
    frame: FrameType | None
    displaced: Any
    local: Tracer | None
    lines: bool
    opcodes: bool

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if event in ("line", "opcode"):
            if opname[frame.f_code.co_code[frame.f_lasti]] in _STILL_OUTSIDE:
                return self
            del self, frame, arg  # the traceback of the exception must not keep them
            raise _Skip
        self._restore(self.local)  # `__enter__` raised
        return self.local(frame, event, arg) if self.local is not None else None

    def __del__(self) -> None:
        if self.local is None or self.displaced is None:
            self._restore(self.local)
        else:
            self._restore(_Unnoticed(self.local))

    def _restore(self, local: Tracer | None) -> None:
        if self.frame is None:
            return
        frame, self.frame = self.frame, None
        frame.f_trace_lines = self.lines
        frame.f_trace_opcodes = self.opcodes
        if local is None:
            del frame.f_trace
        else:
            frame.f_trace = local
        sys.settrace(self.displaced)


class _Unnoticed:
    """Keeps the skip itself from a debugger that would stop at it, then gives way to its trace function."""

    __slots__ = ("_local",)

    def __init__(self, local: Tracer) -> None:
        self._local = local

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        frame.f_trace = self._local
        if event == "exception" and arg[0] is _Skip:
            return self._local
        return self._local(frame, event, arg)
