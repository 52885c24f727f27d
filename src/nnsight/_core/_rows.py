"""Rows: an invoke's part of a batch, in values of any layout.

Which dimension of a tensor follows the batch is learnt, not guessed (see `_layouts`): a dimension as long as
the batch may belong to something else, and a router's `[batch * seq, d]` has no dimension of that length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..errors import EditError, RowsError
from ._aliases import rows_of
from ._joins import Joins, Piece
from ._leaves import map_leaves

SHARED = -1  # a tensor that all rows have in common
UNKNOWN = -2  # a tensor whose rows cannot be told apart

Parts = list[tuple["Rows", torch.Tensor]]
Layout = Mapping[str, int]  # for each leaf of a value, the dimension that follows the batch, or one of the above


class Rows(NamedTuple):
    """Rows `start` to `start + size` of a batch of `total`."""

    start: int
    size: int
    total: int

    def span(self, length: int, path: str) -> tuple[int, int]:
        """The part of a dimension of `length` that belongs to these rows."""
        each, rest = divmod(length, self.total)
        if rest or not each:
            raise RowsError(_UNEVEN.format(path=path, length=length, total=self.total))
        return self.start * each, self.size * each


def take(value: Any, layout: Layout, rows: Rows, path: str, joins: Joins) -> Any:
    """`value` with every tensor narrowed to `rows`; views, so that in-place edits reach the model."""

    def narrow(at: str, tensor: torch.Tensor) -> torch.Tensor:
        dim = layout.get(at, UNKNOWN)
        if dim == SHARED:
            return tensor
        if dim == UNKNOWN:
            raise RowsError(_UNKNOWN.format(path=f"{path}{at}", shape=list(tensor.shape)))
        start, size = rows.span(tensor.shape[dim], f"{path}{at}")
        return rows_of(tensor, dim, start, size, *joins.source(tensor, dim, start, size))

    return map_leaves(narrow, value)


def fit(whole: torch.Tensor, part: torch.Tensor, dim: int, rows: Rows, path: str) -> torch.Tensor:
    """`part` as it can stand for `rows` of `whole`."""
    if dim < 0:
        kind = _SHARED if dim == SHARED else _UNKNOWN
        raise RowsError(kind.format(path=path, shape=list(whole.shape)))
    _, size = rows.span(whole.shape[dim], path)
    expected = [*whole.shape[:dim], size, *whole.shape[dim + 1 :]]
    if list(part.shape) != expected:
        try:
            part = part.expand(expected).contiguous()
        except RuntimeError:
            raise EditError(
                f"{path} was assigned a tensor of shape {list(part.shape)}; the rows of this invoke have {expected}."
            ) from None
    return part.to(whole)


def pieces_of(whole: torch.Tensor, dim: int, parts: Parts) -> list[Piece]:
    """What a tensor like `whole` with `parts` in their rows is made of, in order."""
    found, at = [], 0
    for rows, part in sorted(parts, key=lambda pair: pair[0].start):
        start, size = rows.span(whole.shape[dim], "")
        found += [Piece(whole, at, start - at), Piece(part, 0, size)]
        at = start + size
    found.append(Piece(whole, at, whole.shape[dim] - at))
    return [piece for piece in found if piece.size]


_UNEVEN = """\
{path} has a dimension of {length} here, which does not divide into the {total} rows of the batch: the rows of one \
invoke cannot be told from another's. Read it in a trace of this input alone, or in tracer.invoke() without input, which \
sees the whole batch."""

_UNKNOWN = """\
The rows of one invoke cannot be told from another's at {path} (shape {shape}): its layout depends on the data, it is \
made from all rows together, or it does not follow the batch in one dimension. Read it in a trace of this input alone, or \
in tracer.invoke() without input, which sees the whole batch."""

_SHARED = """\
{path} (shape {shape}) is shared by all rows of the batch, so one invoke cannot change it for itself alone. Change it in \
tracer.invoke() without input, for the whole batch, or trace this input alone."""
