"""Rows: an invoke's part of a batch, in values of any layout.

Which dimension of a tensor follows the batch is learnt, not guessed (see `_layouts`): a dimension as long as
the batch may belong to something else, and a router's `[batch * seq, d]` has no dimension of that length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..errors import EditError, RowsError
from ._leaves import leaves_of, map_leaves, restore

SHARED = -1  # a tensor that all rows have in common
UNKNOWN = -2  # a tensor whose rows cannot be told apart

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


def take(value: Any, layout: Layout, rows: Rows, path: str) -> Any:
    """`value` with every tensor narrowed to `rows`; views, so that in-place edits reach the model."""

    def narrow(at: str, tensor: torch.Tensor) -> torch.Tensor:
        dim = layout[at]
        if dim == SHARED:
            return tensor
        if dim == UNKNOWN:
            raise RowsError(_UNKNOWN.format(path=f"{path}{at}", shape=list(tensor.shape)))
        return tensor.narrow(dim, *rows.span(tensor.shape[dim], f"{path}{at}"))

    return map_leaves(narrow, value)


def put(value: Any, layout: Layout, rows: Rows, seen: Mapping[str, torch.Tensor], new: Any, path: str) -> Any:
    """`new`, which stands for `rows` alone, as a value of the whole batch.

    `seen` holds the leaves that the block was given for these rows: one of them, or of `value`, that is still in `new`
    means "as it was".
    """
    whole, parts = leaves_of(value), leaves_of(new)
    if whole.keys() != parts.keys():
        raise EditError(
            f"{path} holds {len(whole)} tensors ({_names(whole)}) and was assigned {len(parts)} ({_names(parts)}): in a "
            "batch of several invokes an assigned value must have the form of the one it replaces."
        )
    merged = {}
    for at, old in whole.items():
        part = parts[at]
        unchanged = part is old or part is seen.get(at)
        merged[at] = old if unchanged else _merge(old, part, layout[at], rows, f"{path}{at}")
    return restore(new, value, merged)


def _names(leaves: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(at or "itself" for at in list(leaves)[:6]) + (", …" if len(leaves) > 6 else "")


def _merge(old: torch.Tensor, part: torch.Tensor, dim: int, rows: Rows, path: str) -> torch.Tensor:
    if dim < 0:
        kind = _SHARED if dim == SHARED else _UNKNOWN
        raise RowsError(kind.format(path=path, shape=list(old.shape)))
    start, size = rows.span(old.shape[dim], path)
    expected = [*old.shape[:dim], size, *old.shape[dim + 1 :]]
    if list(part.shape) != expected:
        try:
            part = part.expand(expected)
        except RuntimeError:
            raise EditError(
                f"{path} was assigned a tensor of shape {list(part.shape)}; the rows of this invoke have {expected}."
            ) from None
    end = start + size
    pieces = (old.narrow(dim, 0, start), part.to(old), old.narrow(dim, end, old.shape[dim] - end))
    return torch.cat([piece for piece in pieces if piece.shape[dim]], dim)


def join_views(value: Any, layout: Layout, views: list[tuple[Rows, Any]], path: str) -> Any:
    """`value` composed of the views that blocks hold, so that gradients pass through them; objects stay as they are."""
    held = [(rows, leaves_of(seen)) for rows, seen in sorted(views, key=lambda view: view[0].start)]

    def join(at: str, tensor: torch.Tensor) -> torch.Tensor:
        dim = layout[at]
        if dim < 0 or not tensor.requires_grad:
            return tensor
        pieces, done = [], 0
        for rows, tensors in held:
            start, size = rows.span(tensor.shape[dim], path)
            if start < done or tensors[at].shape[dim] != size:
                return tensor
            pieces += [tensor.narrow(dim, done, start - done), tensors[at]]
            done = start + size
        pieces.append(tensor.narrow(dim, done, tensor.shape[dim] - done))
        return torch.cat([piece for piece in pieces if piece.shape[dim]], dim)

    return map_leaves(join, value, in_objects=False)


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
