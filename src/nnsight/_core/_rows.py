"""Rows: an invoke's part of a batch, in values of any layout.

Which dimension of a tensor follows the batch is learnt, not guessed (see `_layouts`): a dimension as long as
the batch may belong to something else, and a router's `[batch * seq, d]` has no dimension of that length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import EditError, RowsError
from ._aliases import rows_of
from ._joins import Joins, Piece
from ._leaves import map_leaves
from ._tuples import rebuild


class Part(NamedTuple):
    """From `start` on, `size` of `total`."""

    start: int
    size: int
    total: int


class Follow(NamedTuple):
    """A dimension that follows the batch.

    Along it the batch stands `groups` times one after the other (twice under classifier-free guidance: `[uncond; cond]`).
    Where it counts what is attached to rows, images for one, `units` says how much of each there was where a row had `each`.
    """

    dim: int
    groups: int = 1
    each: int = 1
    units: tuple[tuple[str, int], ...] = ()


# For each leaf of a value () where all rows have it in common, and None where they cannot be told apart.
Follows = tuple[Follow, ...] | None
Layout = Mapping[str, Follows]

SHARED: Follows = ()
UNKNOWN: Follows = None
BATCH_FIRST: Follows = (Follow(0),)

Parts = list[tuple["Rows", torch.Tensor]]


class Rows(NamedTuple):
    """Rows `start` to `start + size` of a batch of `total`, and by name their part of what is attached to rows."""

    start: int
    size: int
    total: int
    attached: Mapping[str, Part] = {}

    def pieces(self, length: int, follow: Follow, path: str) -> list[tuple[int, int]]:
        """Start and size of each part of a dimension of `length` that belongs to these rows."""
        group, rest = divmod(length, follow.groups)
        span = None if rest else self._span(group, follow)
        if span is None:
            raise RowsError(_UNEVEN.format(path=path, length=length, total=self.total))
        return [(number * group + span[0], span[1]) for number in range(follow.groups)]

    def match(self, length: int, follow: Follow) -> bool:
        """Whether a dimension of `length` can follow the batch in this way."""
        return not length % follow.groups and self._span(length // follow.groups, follow) is not None

    def _span(self, length: int, follow: Follow) -> tuple[int, int] | None:
        if not follow.units:
            return None if length % self.total or not length else _share(self, length)
        # Images may have several sizes, so a dimension counts images or patches: whichever it fits, and to one answer.
        known = [(self.attached[name], unit) for name, unit in follow.units if name in self.attached]
        fitting = [part for part, unit in known if part.total and length * unit == part.total * follow.each]
        answers = {_share(part, length) for part in fitting}
        return answers.pop() if len(answers) == 1 else None


def _share(part: Part | Rows, length: int) -> tuple[int, int] | None:
    start, size = part.start * length, part.size * length
    return None if start % part.total or size % part.total else (start // part.total, size // part.total)


def split_rows(sizes: Sequence[int], attached: Sequence[Mapping[str, int]] = ()) -> Iterator[Rows]:
    """The rows of each of several inputs, from how many each has, and how much of what is attached to rows."""
    counts = attached or [{}] * len(sizes)
    names = dict.fromkeys(name for count in counts for name in count)
    for i, size in enumerate(sizes):
        parts = {name: _part([count.get(name, 0) for count in counts], i) for name in names}
        yield Rows(sum(sizes[:i]), size, sum(sizes), parts)


def _part(sizes: Sequence[int], i: int) -> Part:
    return Part(sum(sizes[:i]), sizes[i], sum(sizes))


def take(value: Any, layout: Layout, rows: Rows, path: str, joins: Joins) -> Any:
    """`value` with every tensor narrowed to `rows`: views, so that in-place edits reach the model, where that can be."""
    return map_leaves(lambda at, leaf: _narrow(leaf, layout.get(at, UNKNOWN), rows, f"{path}{at}", joins), value)


def _narrow(tensor: torch.Tensor, follows: Follows, rows: Rows, path: str, joins: Joins) -> torch.Tensor:
    if follows is None:
        raise RowsError(_UNKNOWN.format(path=path, shape=list(tensor.shape)))
    for follow in follows:
        dim, pieces = follow.dim, rows.pieces(tensor.shape[follow.dim], follow, path)
        start, size = pieces[0]
        if len(pieces) > 1:
            tensor = _pick(tensor, dim, pieces)
        elif len(follows) > 1:
            tensor = tensor.narrow(dim, start, size)
        else:
            tensor = rows_of(tensor, dim, start, size, *joins.source(tensor, dim, start, size))
    return tensor


def _pick(tensor: torch.Tensor, dim: int, pieces: list[tuple[int, int]]) -> torch.Tensor:
    """Parts that do not lie together: a view only where each is a single entry."""
    (start, size), (following, _) = pieces[:2]
    if size == 1:
        return tensor[(*[slice(None)] * dim, slice(start, None, following - start))]
    return torch.cat([tensor.narrow(dim, *piece) for piece in pieces], dim)


def cut_lists(value: Any, rows: Rows) -> Any:
    """The part of `rows` in lists and arrays that are no tensors (images, texts) of what a whole call takes or returns."""
    if isinstance(value, dict):
        cut = copy.copy(value)
        for name, item in value.items():
            cut[name] = cut_lists(item, rows)
        return cut
    if isinstance(value, tuple):
        return rebuild(type(value), [cut_lists(item, rows) for item in value])
    if isinstance(value, torch.Tensor) or not (isinstance(value, list) or hasattr(value, "__array_interface__")):
        return value
    length = len(value) if isinstance(value, list) else value.shape[0] if getattr(value, "ndim", 0) else 0
    if not length or length % rows.total:
        return value
    each = length // rows.total
    return value[rows.start * each : (rows.start + rows.size) * each]


def fit(whole: torch.Tensor, part: torch.Tensor, follows: Follows, rows: Rows, path: str) -> torch.Tensor:
    """`part` as it can stand for `rows` of `whole`."""
    if follows is None or len(follows) != 1:
        kind = _UNKNOWN if follows is None else _TWO if follows else _SHARED
        raise RowsError(kind.format(path=path, shape=list(whole.shape)))
    dim = follows[0].dim
    size = sum(size for _, size in rows.pieces(whole.shape[dim], follows[0], path))
    expected = [*whole.shape[:dim], size, *whole.shape[dim + 1 :]]
    if list(part.shape) != expected:
        try:
            part = part.expand(expected).contiguous()
        except RuntimeError:
            raise EditError(
                f"{path} was assigned a tensor of shape {list(part.shape)}; the rows of this invoke have {expected}."
            ) from None
    return part.to(whole)


def pieces_of(whole: torch.Tensor, follow: Follow, parts: Parts) -> list[Piece]:
    """What a tensor like `whole` with `parts` in their rows is made of, in order."""
    placed: list[tuple[int, Piece]] = []
    for rows, part in parts:
        used = 0
        for start, size in rows.pieces(whole.shape[follow.dim], follow, ""):
            placed.append((start, Piece(part, used, size)))
            used += size
    found, at = [], 0
    for start, piece in sorted(placed, key=lambda pair: pair[0]):
        found += [Piece(whole, at, start - at), piece]
        at = start + piece.size
    found.append(Piece(whole, at, whole.shape[follow.dim] - at))
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

_TWO = """\
{path} (shape {shape}) follows the batch in two dimensions, so one invoke cannot assign a part of it. Change it in place \
(`value[:] = ...`), or trace this input alone."""
