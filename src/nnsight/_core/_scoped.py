"""Scoped: one value of a batch at one visit, as blocks with rows of their own see and change it.

Blocks with rows get views of the model's own tensors, so in-place edits reach the model.  What they assign is kept
apart until the model goes on, or a block of the whole batch looks: then it is joined to one value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import EditError, RowsError
from ._aliases import RowsTensor
from ._joins import Joins, Piece
from ._rows import SHARED, UNKNOWN, Layout, Rows, fit, pieces_of, take
from ._tensors import Mark, are_changed, constants_in, map_tensors, mark, snapshot, tensors_in

if TYPE_CHECKING:
    from ._visit import Visit
    from ._worker import Worker


class _Part:
    """What one block sees of the value, and what it put there: for each tensor its own one, or None."""

    __slots__ = ("own", "path", "rows", "seen", "shared", "views")

    def __init__(self, rows: Rows, count: int, path: str) -> None:
        self.rows = rows
        self.path = path
        self.own: list[torch.Tensor | None] = [None] * count
        self.seen: Any = None
        self.views: list[torch.Tensor] = []
        self.shared: list[Mark] = []


class _Joined(NamedTuple):
    """A value joined of all parts that a block of the whole batch holds, and what it was made of."""

    value: Any
    marks: list[Mark]
    sources: list[Mark]


class Scoped:
    """The value of the whole batch, its layout, and each block's part."""

    __slots__ = ("_joined", "_joins", "_layout", "_parts", "_stale", "_tensors", "value")

    def __init__(self, value: Any, layout: Layout, joins: Joins) -> None:
        self._layout = layout
        self._joins = joins
        self.replace(value)

    def replace(self, value: Any) -> None:
        """A block of the whole batch put `value` in place of everything."""
        self.value = value
        self._tensors = tensors_in(value)
        self._parts: dict[Worker, _Part] = {}
        self._joined: _Joined | None = None
        self._stale: list[Mark] = []

    def give(self, worker: Worker, path: str) -> Any:
        """The rows of `worker`; the same views each time while the model stands here."""
        self._follow()
        part = self._part(worker, path)
        if part.seen is None:
            own = iter(part.own)
            seen = take(self.value, self._layout, worker.rows, path, self._joins)
            part.seen = map_tensors(lambda view: view if (mine := next(own)) is None else mine, seen)
            part.views = tensors_in(part.seen)
            part.shared = _mark([t for t, dim in zip(part.views, self._layout, strict=False) if dim == SHARED])
        return part.seen

    def merge(self, worker: Worker, new: Any, path: str) -> None:
        """Put `new` in the rows of `worker`; a tensor of the old value, or one that the block was given, is left."""
        self._follow()
        self._put(worker, new, path).seen = None

    def whole(self) -> Any:
        """The value of the whole batch with every part in it."""
        self._follow()
        if self._joined is None:
            if not self._has_parts():
                return self.value
            joined = self._join()
            following = iter(joined)
            value = map_tensors(lambda _: next(following), self.value)
            self._joined = _Joined(value, _mark(joined), _mark(self._sources()))
        return self._joined.value

    def settle(self, worker: Worker) -> None:
        """`worker` has run: see that what it changed in place was its own to change."""
        part = self._parts.get(worker)
        if part is not None and are_changed(part.shared):
            raise RowsError(_SHARED.format(path=part.path))
        for other in self._parts.values():
            other.shared = _mark([old.tensor for old in other.shared])
        self._follow()

    def leave(self) -> tuple[Any, bool]:
        """The value that the model goes on with, and whether blocks have put it together."""
        value = self.whole()
        if are_changed(self._stale):
            raise EditError(_STALE.format(path=self._path()))
        if self._joined is not None:
            self._remember(self._joined)
        return value, value is not self.value

    def _part(self, worker: Worker, path: str) -> _Part:
        part = self._parts.get(worker)
        if part is None:
            part = self._parts[worker] = _Part(worker.rows, len(self._tensors), path)
        return part

    def _has_parts(self) -> bool:
        return any(own is not None for part in self._parts.values() for own in part.own)

    def _put(self, worker: Worker, new: Any, path: str) -> _Part:
        if self._joined is not None:
            self._commit(self._joined)
        part = self._part(worker, path)
        found = tensors_in(new)
        if len(found) != len(self._tensors):
            raise EditError(_FORM.format(path=path, count=len(self._tensors), given=len(found)))
        if not _are_same(constants_in(self.value), constants_in(new)):
            raise RowsError(_CONSTANTS.format(path=path))
        for i, tensor in enumerate(found):
            if tensor is not self._tensors[i] and not _is_view(tensor, part.views, i):
                part.own[i] = fit(self._tensors[i], tensor, self._layout[i], part.rows, path)
                part.path = path
        return part

    def _pieces(self, i: int) -> list[Piece]:
        """What the tensor number `i` is made of, in order; nothing where nobody has put anything."""
        parts = [(part.rows, own) for part in self._parts.values() if (own := part.own[i]) is not None]
        return pieces_of(self._tensors[i], self._layout[i], parts) if parts else []

    def _join(self) -> list[torch.Tensor]:
        joined = []
        for i, whole in enumerate(self._tensors):
            pieces, dim = self._pieces(i), self._layout[i]
            joined.append(torch.cat([p.tensor.narrow(dim, p.start, p.size) for p in pieces], dim) if pieces else whole)
        return joined

    def _sources(self) -> list[torch.Tensor]:
        return [*self._tensors, *(own for part in self._parts.values() for own in part.own if own is not None)]

    # --- what was changed since the last look ----------------------------------------------------------------

    def _follow(self) -> None:
        if self._joined is not None:
            self._follow_edits(self._joined)
        for worker, part in list(self._parts.items()):
            if part.seen is not None and _differ(now := tensors_in(part.seen), part.views):
                kept = self._put(worker, part.seen, part.path)
                kept.seen, kept.views = part.seen, now
        now = tensors_in(self.value)
        if len(now) != len(self._tensors):
            self._layout = [UNKNOWN] * len(now)  # whose the items are that a block has put in or taken out
            self.replace(self.value)
        elif self._joined is None:
            self._exchange(list(self._tensors), now)

    def _follow_edits(self, joined: _Joined) -> None:
        """Let a joined value, and what it was made of, go on as one: both are held by somebody."""
        tensors, now = [old.tensor for old in joined.marks], tensors_in(joined.value)
        if len(now) != len(tensors):
            self._commit(joined)
            return
        if are_changed(joined.marks):
            self._change_sources(tensors)
        elif are_changed(joined.sources):
            for tensor, new in zip(tensors, self._join(), strict=True):
                if new is not tensor:
                    tensor.copy_(new)
        elif not _differ(now, tensors):
            return
        if _differ(now, tensors):
            self._exchange(tensors, now)
            following = iter(self._tensors)
            self.value = map_tensors(lambda _: next(following), self.value)
        self._joined = _Joined(joined.value, _mark(now), _mark(self._sources()))

    def _exchange(self, before: list[torch.Tensor], now: list[torch.Tensor]) -> None:
        """A block of the whole batch put other tensors in a list or mapping."""
        changed = [i for i, tensor in enumerate(now) if tensor is not before[i]]
        for i in changed:
            self._tensors[i] = now[i]
            for part in self._parts.values():
                part.own[i] = None
                if part.seen is not None and not _differ(tensors_in(part.seen), part.views):
                    part.seen = None

    def _change_sources(self, joined: list[torch.Tensor]) -> None:
        for i, (whole, tensor) in enumerate(zip(self._tensors, joined, strict=True)):
            if tensor is whole:
                continue
            at, dim = 0, self._layout[i]
            for piece in self._pieces(i):
                try:
                    piece.tensor.narrow(dim, piece.start, piece.size).copy_(tensor.narrow(dim, at, piece.size))
                except RuntimeError as error:
                    raise EditError(_NOT_IN_PLACE.format(error=error)) from error
                at += piece.size
            for part in self._parts.values():
                view = part.views[i] if part.views else None
                if isinstance(view, RowsTensor) and view._held is whole:
                    view._held = tensor  # all of the gradient comes by there now

    def _commit(self, joined: _Joined) -> None:
        # Whatever comes now is put into the joined value: what that was made of reaches the model no more.
        self._remember(joined)
        kept = {id(old.tensor) for old in joined.marks}
        stale = [*self._stale, *(old for old in joined.sources if id(old.tensor) not in kept)]
        self.replace(joined.value)
        self._stale = stale

    def _remember(self, joined: _Joined) -> None:
        for i, old in enumerate(joined.marks):
            if old.tensor is not self._tensors[i]:
                self._joins.add(old.tensor, self._layout[i], self._pieces(i), self._path())

    def _path(self) -> str:
        assigned = [part.path for part in self._parts.values() if any(own is not None for own in part.own)]
        return next(iter(assigned), "a place of the model")


# --- at a visit -------------------------------------------------------------------------------------------


def join_parts(visit: Visit, worker: Worker) -> None:
    """Let a block of the whole batch see what the invokes have put there."""
    scoped = (visit.scoped or {}).get(visit.kind)
    if scoped is not None and worker.rows is None:
        visit.value = value = scoped.whole()
        versions = snapshot(scoped.value) if value is not scoped.value else None
        if versions is not None:
            visit.given = [*(visit.given or ()), (scoped.value, versions, "")]  # an edit may reach it from here


def settle_parts(visit: Visit, worker: Worker) -> None:
    """`worker` has run while the model stood here."""
    scoped = (visit.scoped or {}).get(visit.kind)
    if scoped is not None:
        scoped.settle(worker)


def leave_parts(visit: Visit) -> None:
    """The model goes on from here."""
    scoped = (visit.scoped or {}).get(visit.kind)
    if scoped is not None:
        value, changed = scoped.leave()
        if changed and not visit.written:
            visit.before, visit.written = visit.value, True
        visit.value = value


def _mark(tensors: list[torch.Tensor]) -> list[Mark]:
    return [mark(tensor) for tensor in tensors]


def _differ(tensors: list[torch.Tensor], before: list[torch.Tensor]) -> bool:
    return len(tensors) != len(before) or any(a is not b for a, b in zip(tensors, before, strict=True))


def _is_view(tensor: torch.Tensor, views: list[torch.Tensor], i: int) -> bool:
    """Whether `tensor` is what the block was given in this place, as the block or as the model knows it."""
    if i >= len(views):
        return False
    view = views[i]
    return tensor is view or (isinstance(view, RowsTensor) and tensor is view._alone)


def _are_same(constants: list[Any], others: list[Any]) -> bool:
    return len(constants) == len(others) and all(
        a is b or (type(a) is type(b) and isinstance(a, (str, int, float, complex, bytes)) and a == b)
        for a, b in zip(constants, others, strict=True)
    )


_FORM = """\
{path} holds {count} tensors and was assigned {given}: in a batch of several invokes an assigned value must have the \
form of the one it replaces."""

_CONSTANTS = """\
{path} was assigned a value that differs from the old one in something else than tensors, which is shared by all rows of the \
batch, so one invoke cannot change it for itself alone. Change it in tracer.invoke() without input, for the whole batch, or \
trace this input alone."""

_SHARED = """\
A tensor at {path} was changed in place by one invoke, but it is shared by all rows of the batch. Change it in \
tracer.invoke() without input, for the whole batch, or trace this input alone."""

_NOT_IN_PLACE = """\
A value of the whole batch was changed in place after an invoke had assigned to it, and PyTorch refuses the same change of \
the tensors it was made of ({error}). Assign the changed value instead: `module.output = changed`."""

_STALE = """\
{path} was changed in place by a block that had read it before another block assigned a new value there or changed the \
whole batch's: the change reaches nothing. Read it again before you change it."""
