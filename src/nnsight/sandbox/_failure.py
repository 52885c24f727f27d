"""An exception of a block as data: its class, its text, and the user's lines it came through."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from types import CodeType, TracebackType
from typing import Any

from ..protocol import Failure, Line

_MOST_LINES = 100
_MOST_TEXT = 20_000


def describe_failure(
    error: BaseException, is_users: Callable[[str], bool], definitions: Mapping[int, Any] | None = None, depth: int = 0
) -> Failure:
    """The failure for an exception; lines of files that are not the user's are left out."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    cls = type(error)
    return Failure(
        module=cls.__module__,
        name=cls.__qualname__,
        text=_text(error),
        args=_plain_args(error),
        lines=_lines(error.__traceback__, is_users),
        notes=[str(note)[:_MOST_TEXT] for note in getattr(error, "__notes__", [])][:20],
        cause=describe_failure(cause, is_users, definitions, depth + 1) if cause is not None and depth < 5 else None,
        defined=next((number for number, made in (definitions or {}).items() if made is cls), None),
    )


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_MOST_TEXT]
    except Exception as failure:
        return f"<its text cannot be had: {type(failure).__name__}>"


def _plain_args(error: BaseException) -> list[Any]:
    small = (isinstance(arg, (int, float)) and abs(arg) < 2**63 for arg in error.args)
    plain = [arg is None or (isinstance(arg, str) and len(arg) <= _MOST_TEXT) for arg in error.args]
    return list(error.args) if all(a or b for a, b in zip(plain, small, strict=True)) else []


def _lines(found: TracebackType | None, is_users: Callable[[str], bool]) -> list[Line]:
    lines = []
    while found is not None:
        code = found.tb_frame.f_code
        if is_users(code.co_filename):
            lines.append(Line(code.co_filename, found.tb_lineno, code.co_name, _columns(code, found.tb_lasti)))
        found = found.tb_next
    return lines[:_MOST_LINES]


def _columns(code: CodeType, instruction: int) -> tuple[int, int] | None:
    if sys.version_info < (3, 11):
        return None
    first, last, start, end = list(code.co_positions())[instruction // 2]
    return (start, end) if first == last and start is not None and end is not None else None


def summary(error: BaseException) -> str:
    """One line about an error, for the server's log."""
    return traceback.format_exception_only(error)[-1].strip()[:500]
