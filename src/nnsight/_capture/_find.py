"""Which with-statement, and which of its items, a frame is entering."""

import ast
import dis
import sys
from types import CodeType
from typing import NamedTuple

from ..errors import CaptureError

Place = tuple[int | None, ...]


class Entry(NamedTuple):
    """The place in the text where the code enters a context, and its number among the entries there."""

    place: Place
    ordinal: int


NOT_A_WITH = """\
line {line}: a block that runs later must be entered by a `with` statement that stands in the code, \
not through `ExitStack.enter_context`, a decorator or a call of `__enter__`."""


def entry_at(code: CodeType, offset: int) -> Entry:
    """The entry that the instruction at `offset` makes."""
    if not _enters(code.co_code, offset):
        line = next((line for start, end, line in code.co_lines() if start <= offset < end), None)
        raise CaptureError(NOT_A_WITH.format(line=line))
    places = _places(code)
    offsets = [at for at in range(0, len(code.co_code), 2) if _enters(code.co_code, at)]
    same = [at for at in offsets if places[at] == places[offset]]
    return Entry(places[offset], same.index(offset))


def matching_item(nodes: list[ast.With | ast.AsyncWith], entry: Entry) -> tuple[int, int] | None:
    """The indices of the statement and of its item that an entry is of."""
    found = [
        (index, item)
        for index, node in enumerate(nodes)
        for item, part in enumerate(node.items)
        if entry.place in (_place(node), _place(part.context_expr))
    ]
    # The compiler may write a statement twice, as it does with those in a `finally`
    return found[entry.ordinal % len(found)] if found else None


def _enters(code: bytes, offset: int) -> bool:
    """Whether the instruction calls `__enter__`; that of Python 3.14 is an ordinary call."""
    name = dis.opname[code[offset]]
    if name == "CALL" and offset >= 2:
        return dis.opname[code[offset - 2]] == "LOAD_SPECIAL"
    return name in ("BEFORE_WITH", "SETUP_WITH", "BEFORE_ASYNC_WITH")


if sys.version_info >= (3, 11):

    def _places(code: CodeType) -> dict[int, Place]:
        return {index * 2: place for index, place in enumerate(code.co_positions())}

    def _place(node: ast.stmt | ast.expr) -> Place:
        return (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)

else:  # lines alone, which tell statements apart: no two of them start on the same

    def _places(code: CodeType) -> dict[int, Place]:
        return {at: (line,) for start, end, line in code.co_lines() for at in range(start, end, 2)}

    def _place(node: ast.stmt | ast.expr) -> Place:
        return (node.lineno,) if isinstance(node, ast.stmt) else ()
