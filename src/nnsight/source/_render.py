"""A function's source with its operations named in a gutter on the left.

self_c_attn_0        -> 40          query_states, ... = self.c_attn(hidden_states).split(...)
self_c_attn_split_0   +
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from ._operations import Operation

CONTEXT = 5  # lines on either side of a highlighted operation
ARROW, MORE, HERE, REST = "->", " +", "=>", " |"


def render(title: str, lines: Sequence[str], operations: Iterable[Operation]) -> str:
    """The whole function."""
    operations = list(operations)
    rows = _rows(lines, operations, range(1, len(lines) + 1), None)
    return "\n".join([title, "", *rows])


def render_around(title: str, lines: Sequence[str], operations: Iterable[Operation], chosen: Operation) -> str:
    """The lines around one operation, its own marked."""
    first, last = max(1, chosen.line - CONTEXT), min(len(lines), chosen.end + CONTEXT)
    shown = [operation for operation in operations if first <= operation.line <= last]
    rows = list(_rows(lines, shown, range(first, last + 1), chosen))
    before, after = ["..."] * (first > 1), ["..."] * (last < len(lines))
    return "\n".join([title, "", *before, *rows, *after])


def _rows(lines: Sequence[str], operations: list[Operation], numbers: range, chosen: Operation | None) -> Iterator[str]:
    starting: dict[int, list[Operation]] = defaultdict(list)
    for operation in operations:
        starting[operation.line].append(operation)
    width = max((len(operation.name) for operation in operations), default=0)
    digits = len(str(numbers[-1]))
    code = textwrap.dedent("\n".join(lines)).split("\n")
    for number in numbers:
        here = starting[number]
        name, mark = (here[0].name, _mark(here[0], chosen)) if here else ("", _inside(number, chosen))
        yield f"{name:<{width}} {mark} {number:>{digits}}  {code[number - 1]}".rstrip()
        for operation in here[1:]:
            yield f"{operation.name:<{width}} {HERE if operation is chosen else MORE}"


def _mark(operation: Operation, chosen: Operation | None) -> str:
    return HERE if operation is chosen else ARROW


def _inside(number: int, chosen: Operation | None) -> str:
    return REST if chosen is not None and chosen.line < number <= chosen.end else "  "
