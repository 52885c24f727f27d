"""Which line is the user's: looking past nnsight's own frames, and leaving them out of tracebacks."""

from __future__ import annotations

import os
import sys
from types import FrameType, TracebackType
from typing import NamedTuple

from ..config import CONFIG

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Line(NamedTuple):
    """A line of somebody's code."""

    filename: str
    number: int


def is_own_frame(frame: FrameType) -> bool:
    """Whether `frame` runs nnsight's code."""
    return frame.f_code.co_filename.startswith(_PACKAGE)


def user_frame() -> FrameType | None:
    """The innermost frame that is not nnsight's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_own_frame(frame):
        frame = frame.f_back
    return frame


def user_line() -> Line | None:
    """The line of the user's code that is running."""
    frame = user_frame()
    return None if frame is None else Line(frame.f_code.co_filename, frame.f_lineno)


def describe_line(line: Line | None) -> str:
    """`line 12 of script.py`."""
    return "an unknown line" if line is None else f"line {line.number} of {os.path.basename(line.filename)}"


def trim(traceback: TracebackType | None) -> TracebackType | None:
    """`traceback` without nnsight's own frames, unless `CONFIG.APP.DEBUG`."""
    if CONFIG.APP.DEBUG:
        return traceback
    while traceback is not None and is_own_frame(traceback.tb_frame):
        traceback = traceback.tb_next
    kept = traceback
    while kept is not None:
        following = kept.tb_next
        while following is not None and is_own_frame(following.tb_frame):
            following = following.tb_next
        kept.tb_next = following
        kept = following
    return traceback
