"""Compiled codes: those within one, and whether two are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import CodeType

_DOES = (
    *("co_code", "co_names", "co_varnames", "co_cellvars", "co_freevars"),
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount"),
)
_STANDS = ("co_firstlineno", "co_linetable")


def nested_codes(code: CodeType) -> Iterator[CodeType]:
    """A code and those within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested_codes(constant)


def is_same_code(one: CodeType, other: CodeType, *, placed: bool) -> bool:
    """Whether two codes do the same, and where it matters are `placed` on the same lines.

    `==` sees a tracer's marks too, and the name IPython gives a cell.
    """
    parts = (*_DOES, *_STANDS) if placed else _DOES
    same = all(getattr(one, name) == getattr(other, name) for name in parts)
    return same and _are_same(one.co_consts, other.co_consts, placed)


def _are_same(ones: Sequence[object], others: Sequence[object], placed: bool) -> bool:
    return len(ones) == len(others) and all(_is_same(*pair, placed) for pair in zip(ones, others, strict=True))


def _is_same(one: object, other: object, placed: bool) -> bool:
    if isinstance(one, CodeType) and isinstance(other, CodeType):
        return is_same_code(one, other, placed=placed)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return _are_same(one, other, placed)
    if isinstance(one, (float, complex)):  # 0.0 equals -0.0, and nan not itself
        return type(one) is type(other) and repr(one) == repr(other)
    return type(one) is type(other) and one == other
