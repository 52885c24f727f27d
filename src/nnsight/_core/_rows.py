"""Rows: an invoke's part of a batch, in values of any layout.

Which dimension of a tensor follows the batch is learnt, not guessed (see `_layouts`): a dimension as long as
the batch may belong to something else, and a router's `[batch * seq, d]` has no dimension of that length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import EditError, RowsError
from ._leaves import leaves_of, map_leaves, restore


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


Follows = (
    tuple[Follow, ...] | None
)  # () for a tensor that all rows have in common, None where they cannot be told apart
Layout = Mapping[str, Follows]  # for each leaf of a value

SHARED: Follows = ()
UNKNOWN: Follows = None
BATCH_FIRST: Follows = (Follow(0),)


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

    def fit(self, length: int, follow: Follow) -> bool:
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


def take(value: Any, layout: Layout, rows: Rows, path: str) -> Any:
    """`value` with every tensor narrowed to `rows`: views, so that in-place edits reach the model, where that can be."""
    return map_leaves(lambda at, tensor: _narrow(tensor, layout[at], rows, f"{path}{at}"), value)


def _narrow(tensor: torch.Tensor, follows: Follows, rows: Rows, path: str) -> torch.Tensor:
    if follows is None:
        raise RowsError(_UNKNOWN.format(path=path, shape=list(tensor.shape)))
    for follow in follows:
        pieces = rows.pieces(tensor.shape[follow.dim], follow, path)
        start, size = pieces[0]
        if len(pieces) == 1:
            tensor = tensor.narrow(follow.dim, start, size)
        elif size == 1:
            stride = pieces[1][0] - start
            tensor = tensor[(*[slice(None)] * follow.dim, slice(start, None, stride))]
        else:
            tensor = torch.cat([tensor.narrow(follow.dim, *piece) for piece in pieces], follow.dim)
    return tensor


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


def _merge(old: torch.Tensor, part: torch.Tensor, follows: Follows, rows: Rows, path: str) -> torch.Tensor:
    if not follows:
        kind = _UNKNOWN if follows is None else _SHARED
        raise RowsError(kind.format(path=path, shape=list(old.shape)))
    expected = list(old.shape)
    for follow in follows:
        expected[follow.dim] = sum(size for _, size in rows.pieces(old.shape[follow.dim], follow, path))
    if list(part.shape) != expected:
        try:
            part = part.expand(expected)
        except RuntimeError:
            raise EditError(
                f"{path} was assigned a tensor of shape {list(part.shape)}; the rows of this invoke have {expected}."
            ) from None
    return _exchange(old, part.to(old), follows, rows, path)


def _exchange(
    old: torch.Tensor, part: torch.Tensor, follows: tuple[Follow, ...], rows: Rows, path: str
) -> torch.Tensor:
    """`old` with `part` where `rows` are along the first of `follows`; along the others, within that."""
    (dim, *_), rest = follows[0], follows[1:]
    composed, at, used = [], 0, 0
    for start, size in rows.pieces(old.shape[dim], follows[0], path):
        piece = part.narrow(dim, used, size)
        if rest and size:
            piece = _exchange(old.narrow(dim, start, size), piece, rest, rows, path)
        composed += [old.narrow(dim, at, start - at), piece]
        at, used = start + size, used + size
    composed.append(old.narrow(dim, at, old.shape[dim] - at))
    return torch.cat([piece for piece in composed if piece.shape[dim]], dim)


def join_views(value: Any, layout: Layout, views: list[tuple[Rows, Any]], path: str) -> Any:
    """`value` composed of the views that blocks hold, so that gradients pass through them; objects stay as they are."""
    held = [(rows, leaves_of(seen)) for rows, seen in views]

    def join(at: str, tensor: torch.Tensor) -> torch.Tensor:
        follows = layout[at]
        if follows is None or len(follows) != 1 or not tensor.requires_grad:
            return tensor
        dim, length = follows[0].dim, tensor.shape[follows[0].dim]
        placed: list[tuple[int, torch.Tensor]] = []
        for rows, tensors in held:
            pieces, used = rows.pieces(length, follows[0], path), 0
            if tensors[at].shape[dim] != sum(size for _, size in pieces):
                return tensor
            for start, size in pieces:
                placed.append((start, tensors[at].narrow(dim, used, size)))
                used += size
        return _compose(tensor, dim, placed)

    return map_leaves(join, value, in_objects=False)


def _compose(tensor: torch.Tensor, dim: int, placed: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    composed, done = [], 0
    for start, piece in sorted(placed, key=lambda pair: pair[0]):
        if start < done:
            return tensor
        composed += [tensor.narrow(dim, done, start - done), piece]
        done = start + piece.shape[dim]
    composed.append(tensor.narrow(dim, done, tensor.shape[dim] - done))
    return torch.cat([piece for piece in composed if piece.shape[dim]], dim)


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
