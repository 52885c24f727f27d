"""Joins: tensors put together of what the model had and what invokes assigned, while the model goes on with them.

The rows of an invoke that assigned nothing are copies there.  Whatever else of the model holds the old tensor (a residual
stream) does not see an edit in place of the copy, which it would have seen without the other invokes: that is refused.  A
gradient of such rows is that of the old tensor, which has all of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import EditError
from ._tensors import Mark, are_changed, mark


class Piece(NamedTuple):
    """Part of a joined tensor, `size` long, which was `tensor` from `start` on."""

    tensor: torch.Tensor
    start: int
    size: int


class _Kept(NamedTuple):
    """A piece that its tensor does not stay alive for."""

    tensor: weakref.ref[torch.Tensor]
    storage: StorageWeakRef
    version: int
    start: int
    size: int


class _Join(NamedTuple):
    tensor: weakref.ref[torch.Tensor]
    version: int
    dim: int
    pieces: list[_Kept]
    path: str


class Joins:
    """The joined tensors of one run that are still in use."""

    def __init__(self) -> None:
        self._known: dict[int, _Join] = {}
        self._before: list[tuple[Mark, _Join]] = []

    def __bool__(self) -> bool:
        return bool(self._known)

    def add(self, joined: torch.Tensor, dim: int, pieces: Sequence[Piece], path: str) -> None:
        """Remember what a tensor that the model goes on with was made of."""
        kept = [
            _Kept(
                weakref.ref(p.tensor), StorageWeakRef(p.tensor.untyped_storage()), _version(p.tensor), p.start, p.size
            )
            for p in pieces
        ]
        key = id(joined)
        reference = weakref.ref(joined, lambda _: self._known.pop(key, None))
        entry = self._known[key] = _Join(reference, _version(joined), dim, kept, path)
        self._before.append((mark(joined), entry))

    def source(self, tensor: torch.Tensor, dim: int, start: int, size: int) -> tuple[torch.Tensor, int]:
        """Where the gradients of these rows arrive: in the tensor they came from, unless that has gone or has changed."""
        source, at = self._nearest(tensor, dim, start, size)
        return (tensor, start) if source is tensor else self.source(source, dim, at, size)

    def _nearest(self, tensor: torch.Tensor, dim: int, start: int, size: int) -> tuple[torch.Tensor, int]:
        join = self._known.get(id(tensor))
        if join is None or join.tensor() is not tensor or join.dim != dim or join.version != _version(tensor):
            return tensor, start
        at = 0
        for piece in join.pieces:
            if at <= start and start + size <= at + piece.size:
                source = piece.tensor()
                if source is not None and source.requires_grad and _version(source) == piece.version:
                    return source, piece.start + start - at
                break
            at += piece.size
        return tensor, start

    def begin(self) -> None:
        """Blocks are about to run."""
        joins = [(tensor, join) for join in list(self._known.values()) if (tensor := join.tensor()) is not None]
        self._before = [(mark(tensor), join) for tensor, join in joins]

    def check(self) -> None:
        """Refuse what they changed in place, where somebody holds what it was before."""
        before, self._before = self._before, []
        for old, join in before:
            if are_changed([old]) and any(not piece.storage.expired() for piece in join.pieces):
                raise EditError(_CHANGED.format(path=join.path))

    def clear(self) -> None:
        """Let go of every tensor."""
        self._known.clear()
        self._before.clear()


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_CHANGED = """\
A value was changed in place that an invoke had put together by assigning its rows at {path}: what else holds the old value \
(the model, or a variable) would not see the change, as it does where nothing was assigned. Assign the changed value instead \
(`module.output = changed`), or trace the inputs apart."""
