"""A failure on the server as the exception it is: the same class, with the user's own file, line and source."""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from .. import errors
from ..errors import RemoteError
from ..protocol import Failure, Line


def exception_of(failure: Failure, definitions: Sequence[Any] = ()) -> BaseException:
    """The exception, with a traceback through the user's lines.

    A class is never loaded to make it: it is a built-in one, one of nnsight, torch or transformers, or one that the job
    itself brought; any other becomes a `RemoteError` that names it.
    """
    error = _make(_class(failure, definitions), failure)
    for note in failure.notes:
        _add_note(error, note)
    error.__traceback__ = _traceback(failure.lines)
    if failure.cause is not None:
        error.__cause__ = exception_of(failure.cause, definitions)
    return error


def _class(failure: Failure, definitions: Sequence[Any]) -> type[BaseException] | None:
    if failure.defined is not None and 0 <= failure.defined < len(definitions):
        return _if_exception(definitions[failure.defined])
    if failure.module == "builtins":
        return _if_exception(getattr(builtins, failure.name, None))
    if failure.module == "nnsight.errors":
        return _if_exception(getattr(errors, failure.name, None))
    if failure.module.partition(".")[0] in ("torch", "transformers"):
        return _if_exception(getattr(sys.modules.get(failure.module), failure.name, None))
    return None


def _if_exception(found: Any) -> type[BaseException] | None:
    if isinstance(found, type) and issubclass(found, BaseException):
        return found if not issubclass(found, (SystemExit, KeyboardInterrupt, GeneratorExit)) else None
    return None


def _make(cls: type[BaseException] | None, failure: Failure) -> BaseException:
    if cls is None:
        return RemoteError(f"{failure.module}.{failure.name}: {failure.text}")
    for args in (tuple(failure.args), (failure.text,)):
        try:
            error = cls(*args)
            if str(error) == failure.text:
                return error
        except Exception:
            continue
    error = cls.__new__(cls, failure.text)
    BaseException.__init__(error, failure.text)
    return error


def _add_note(error: BaseException, note: str) -> None:
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        vars(error).setdefault("__notes__", []).append(note)


def _traceback(lines: Sequence[Line]) -> TracebackType | None:
    """A traceback that shows these lines; the frames are of empty code that is placed there."""
    found: TracebackType | None = None
    for line in reversed(lines):
        frame = _frame_at(line)
        found = TracebackType(found, frame, frame.f_lasti, line.number)
    return found


def _frame_at(line: Line) -> FrameType:
    tree = ast.parse("frame()", mode="eval")
    start, end = line.columns or (0, 0)
    for node in ast.walk(tree):
        if isinstance(node, ast.expr):
            node.lineno = node.end_lineno = max(line.number, 1)
            node.col_offset, node.end_col_offset = start, end
    changes: dict[str, Any] = {"co_name": line.function}
    code = compile(tree, line.filename, "eval")
    if hasattr(code, "co_qualname"):  # Python 3.11
        changes["co_qualname"] = line.function
    return eval(code.replace(**changes), {"frame": lambda: sys._getframe(1)})
