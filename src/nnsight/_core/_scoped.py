"""Scoped: one value of a batch at one visit, as blocks with rows of their own see and change it.

Blocks with rows get views of the model's own tensors, so in-place edits reach the model.  What they assign is kept
apart until the model goes on, or a block of the whole batch looks: then it is joined to one value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import EditError, RowsError
from ._aliases import RowsTensor
from ._joins import Joins, Piece
from ._leaves import leaves_of, map_leaves, restore
from ._rows import SHARED, UNKNOWN, Follow, Layout, Rows, fit, pieces_of, take
from ._tensors import Mark, are_changed, constants_in, mark, snapshot

if TYPE_CHECKING:
    from ._edits import Edits
    from ._visit import Visit
    from ._worker import Worker


Leaves = dict[str, torch.Tensor]


class _Part:
    """What one block sees of the value, and the tensors it put there."""

    __slots__ = ("copies", "own", "path", "rows", "seen", "shared", "views", "written")

    def __init__(self, rows: Rows, path: str) -> None:
        self.rows = rows
        self.path = path
        self.own: Leaves = {}
        self.seen: Any = None
        self.views: Leaves = {}
        self.shared: list[Mark] = []
        self.copies: dict[str, Mark] = {}  # of rows that do not lie together in memory
        self.written: list[str] = []  # those of them that were changed


class _Joined(NamedTuple):
    """A value joined of all parts that a block of the whole batch holds, and what it was made of."""

    value: Any
    leaves: Leaves
    marks: list[Mark]
    sources: list[Mark]


class Scoped:
    """The value of the whole batch, its layout, and each block's part.

    Blocks see copies of the objects in it (a cache); the model's own get what blocks put there when it goes on.
    """

    __slots__ = ("_joined", "_joins", "_layout", "_native", "_parts", "_stale", "_tensors", "value")

    def __init__(self, value: Any, layout: Layout, joins: Joins) -> None:
        self._layout = layout
        self._joins = joins
        self.replace(value)

    def replace(self, value: Any) -> None:
        """A block of the whole batch put `value` in place of everything."""
        self._native = value
        self._begin(value)

    def _begin(self, value: Any) -> None:
        self.value = value
        self._tensors = leaves_of(value)
        self._parts: dict[Worker, _Part] = {}
        self._joined: _Joined | None = None
        self._stale: list[Mark] = []

    def give(self, worker: Worker, path: str) -> Any:
        """The rows of `worker`; the same views each time while the model stands here."""
        self._follow()
        part = self._part(worker, path)
        if part.seen is None:
            seen = take(self.value, self._layout, worker.rows, path, self._joins)
            part.seen = map_leaves(lambda at, view: part.own.get(at, view), seen) if part.own else seen
            part.views = leaves_of(part.seen)
            part.shared = _mark(leaf for at, leaf in part.views.items() if self._layout[at] == SHARED)
            copies = {at: leaf for at, leaf in part.views.items() if at not in part.own and self._is_copy(at, leaf)}
            part.copies = {at: mark(leaf) for at, leaf in copies.items()}
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
            value = map_leaves(lambda at, _: joined[at], self.value)
            self._joined = _Joined(value, joined, _mark(joined.values()), _mark(self._sources()))
        return self._joined.value

    def settle(self, worker: Worker) -> None:
        """`worker` has run: see that what it changed in place was its own to change."""
        part = self._parts.get(worker)
        if part is not None and are_changed(part.shared):
            raise RowsError(_SHARED.format(path=part.path))
        for other in self._parts.values():
            other.shared = _mark(old.tensor for old in other.shared)
        self._follow()

    def leave(self) -> tuple[Any, bool]:
        """The value that the model goes on with, and whether blocks have put it together."""
        value = self.whole()
        if are_changed(self._stale):
            raise EditError(_STALE.format(path=self._path()))
        changed = value is not self.value
        if self._joined is not None:
            self._remember(self._joined)
        if value is not self._native:
            value = restore(value, self._native, leaves_of(value))
        return value, changed

    def sources(self) -> list[torch.Tensor]:
        """Every tensor that the value is made of: a change of one of them is in the value."""
        return [*self._sources(), *(old.tensor for old in self._stale)]

    def copies(self) -> Iterator[tuple[torch.Tensor, str]]:
        """What blocks were given that shares no memory with the model: once it goes on, changes reach nothing."""
        for part in self._parts.values():
            for at in [*part.copies, *part.written]:
                yield part.views[at], f"{part.path}{at}"

    def _part(self, worker: Worker, path: str) -> _Part:
        part = self._parts.get(worker)
        if part is None:
            part = self._parts[worker] = _Part(worker.rows, path)
        return part

    def _is_copy(self, at: str, leaf: torch.Tensor) -> bool:
        follows = self._layout[at] or ()
        return any(follow.groups > 1 for follow in follows) and not _share_memory(leaf, self._tensors[at])

    def _has_parts(self) -> bool:
        return any(part.own for part in self._parts.values())

    def _put(self, worker: Worker, new: Any, path: str) -> _Part:
        if self._joined is not None:
            self._commit(self._joined)
        part = self._part(worker, path)
        found = leaves_of(new)
        if found.keys() != self._tensors.keys():
            raise EditError(_FORM.format(path=path, before=_names(self._tensors), given=_names(found)))
        if not _are_same(constants_in(self.value), constants_in(new)):
            raise RowsError(_CONSTANTS.format(path=path))
        for at, tensor in found.items():
            if tensor is not self._tensors[at] and not _is_view(tensor, part.views.get(at)):
                part.own[at] = fit(self._tensors[at], tensor, self._layout.get(at, UNKNOWN), part.rows, f"{path}{at}")
                part.path = path
        return part

    def _pieces(self, at: str) -> list[Piece]:
        """What the tensor there is made of, in order; nothing where nobody has put anything."""
        parts = [(part.rows, part.own[at]) for part in self._parts.values() if at in part.own]
        return pieces_of(self._tensors[at], self._follow_at(at), parts) if parts else []

    def _follow_at(self, at: str) -> Follow:
        follows = self._layout[at]
        assert follows is not None  # a tensor was put there
        return follows[0]

    def _join(self) -> Leaves:
        joined = {}
        for at, whole in self._tensors.items():
            pieces = self._pieces(at)
            dim = self._follow_at(at).dim if pieces else 0
            joined[at] = torch.cat([p.tensor.narrow(dim, p.start, p.size) for p in pieces], dim) if pieces else whole
        return joined

    def _sources(self) -> list[torch.Tensor]:
        return [*self._tensors.values(), *(own for part in self._parts.values() for own in part.own.values())]

    # --- what was changed since the last look ----------------------------------------------------------------

    def _follow(self) -> None:
        if self._joined is not None:
            self._follow_edits(self._joined)
        self._keep_changed_copies()
        for worker, part in list(self._parts.items()):
            if part.seen is not None and _differ(now := leaves_of(part.seen), part.views):
                kept = self._put(worker, part.seen, part.path)
                kept.seen, kept.views = part.seen, now
        now = leaves_of(self.value)
        if now.keys() != self._tensors.keys():
            self._layout = {}  # whose the items are that a block has put in or taken out is not known
            self.replace(self.value)
        elif self._joined is None:
            self._exchange(self._tensors, now)

    def _keep_changed_copies(self) -> None:
        changed = [(p, at) for p in self._parts.values() for at, old in p.copies.items() if are_changed([old])]
        if changed and self._joined is not None:
            self._commit(self._joined)
        for part, at in changed:
            part.own[at] = part.views[at]
            part.written.append(at)
            del part.copies[at]

    def _follow_edits(self, joined: _Joined) -> None:
        """Let a joined value, and what it was made of, go on as one: both are held by somebody."""
        now = leaves_of(joined.value)
        if now.keys() != joined.leaves.keys():
            self._commit(joined)
            return
        if are_changed(joined.marks):
            self._change_sources(joined.leaves)
        elif are_changed(joined.sources):
            new = self._join()
            for at, tensor in joined.leaves.items():
                if new[at] is not tensor:
                    tensor.copy_(new[at])
        elif not _differ(now, joined.leaves):
            return
        if _differ(now, joined.leaves):
            self._exchange(joined.leaves, now)
            self.value = map_leaves(lambda at, _: self._tensors[at], self.value)
        self._joined = _Joined(joined.value, now, _mark(now.values()), _mark(self._sources()))

    def _exchange(self, before: Leaves, now: Leaves) -> None:
        """A block of the whole batch put other tensors in a list or mapping."""
        for at in [at for at, tensor in now.items() if tensor is not before[at]]:
            self._tensors[at] = now[at]
            for part in self._parts.values():
                part.own.pop(at, None)
                if part.seen is not None and not _differ(leaves_of(part.seen), part.views):
                    part.seen = None

    def _change_sources(self, joined: Leaves) -> None:
        for at, tensor in joined.items():
            whole = self._tensors[at]
            if tensor is whole:
                continue
            start, dim = 0, self._follow_at(at).dim
            for piece in self._pieces(at):
                try:
                    piece.tensor.narrow(dim, piece.start, piece.size).copy_(tensor.narrow(dim, start, piece.size))
                except RuntimeError as error:
                    raise EditError(_NOT_IN_PLACE.format(error=error)) from error
                start += piece.size
            for part in self._parts.values():
                view = part.views.get(at)
                if isinstance(view, RowsTensor) and view._held is whole:
                    view._held = tensor  # all of the gradient comes by there now

    def _commit(self, joined: _Joined) -> None:
        # Whatever comes now is put into the joined value: what that was made of reaches the model no more.
        self._remember(joined)
        kept = {id(old.tensor) for old in joined.marks}
        stale = [*self._stale, *(old for old in joined.sources if id(old.tensor) not in kept)]
        self._begin(joined.value)
        self._stale = stale

    def _remember(self, joined: _Joined) -> None:
        for at, tensor in joined.leaves.items():
            if tensor is not self._tensors[at]:
                self._joins.add(tensor, self._follow_at(at).dim, self._pieces(at), self._path())

    def _path(self) -> str:
        assigned = [part.path for part in self._parts.values() if part.own]
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


def leave_parts(visit: Visit, edits: Edits) -> None:
    """The model goes on from here."""
    scoped = (visit.scoped or {}).get(visit.kind)
    if scoped is not None:
        copies = list(scoped.copies())
        value, changed = scoped.leave()
        if changed and not visit.written:
            visit.before, visit.written = visit.value, True
        visit.value = value
        if copies:
            edits.note_passed(copies)


def _mark(tensors: Iterable[torch.Tensor]) -> list[Mark]:
    return [mark(tensor) for tensor in tensors]


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _differ(leaves: Leaves, before: Leaves) -> bool:
    return leaves.keys() != before.keys() or any(leaf is not before[at] for at, leaf in leaves.items())


def _names(leaves: Leaves) -> str:
    names = ", ".join(at or "itself" for at in list(leaves)[:6]) + (", …" if len(leaves) > 6 else "")
    return f"{len(leaves)} tensors ({names})" if len(leaves) != 1 else "1 tensor"


def _is_view(tensor: torch.Tensor, view: torch.Tensor | None) -> bool:
    """Whether `tensor` is what the block was given in this place, as the block or as the model knows it."""
    return tensor is view or (isinstance(view, RowsTensor) and tensor is view._alone)


def _are_same(constants: list[Any], others: list[Any]) -> bool:
    return len(constants) == len(others) and all(
        a is b or (type(a) is type(b) and ((_is_number_or_text(a) and a == b) or bool(leaves_of(a))))
        for a, b in zip(constants, others, strict=True)
    )


def _is_number_or_text(value: Any) -> bool:
    return isinstance(value, (str, int, float, complex, bytes))


_FORM = """\
{path} holds {before} and was assigned {given}: in a batch of several invokes an assigned value must have the \
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
