"""Scoped: one value of a batch at one visit, as blocks with rows of their own see and change it.

Blocks with rows get views of the model's own tensors, so in-place edits reach the model.  What they assign is kept
apart until the model goes on, or a block of the whole batch looks: then it is joined to one value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import EditError, RowsError
from ._aliases import RowsTensor
from ._rows import SHARED, Layout, Rows, fit, join, take
from ._tensors import constants_in, map_tensors, tensors_in

if TYPE_CHECKING:
    from ._visit import Visit
    from ._worker import Worker


class _Mark(NamedTuple):
    """A tensor, and what tells whether it was changed in place since; inference tensors have no version."""

    tensor: torch.Tensor
    version: int
    copy: torch.Tensor | None

    def is_changed(self) -> bool:
        tensor, version, copy = self
        if copy is None:
            return tensor._version != version
        if isinstance(tensor, FakeTensor):
            return False
        return not bool(((tensor == copy) | ((tensor != tensor) & (copy != copy))).all())


class _Part:
    """What one block sees of the value, and what it put there: for each tensor its own one, or None."""

    __slots__ = ("own", "path", "rows", "seen", "shared", "views")

    def __init__(self, rows: Rows, count: int, path: str) -> None:
        self.rows = rows
        self.path = path
        self.own: list[torch.Tensor | None] = [None] * count
        self.seen: Any = None
        self.views: list[torch.Tensor] = []
        self.shared: list[_Mark] = []


class _Joined(NamedTuple):
    """A value joined of all parts that a block of the whole batch holds, and what it was made of."""

    value: Any
    marks: list[_Mark]
    sources: list[_Mark]


class Scoped:
    """The value of the whole batch, its layout, and each block's part."""

    __slots__ = ("_joined", "_layout", "_parts", "_stale", "_tensors", "value")

    def __init__(self, value: Any, layout: Layout) -> None:
        self._layout = layout
        self.replace(value)

    def replace(self, value: Any) -> None:
        """A block of the whole batch put `value` in place of everything."""
        self.value = value
        self._tensors = tensors_in(value)
        self._parts: dict[Worker, _Part] = {}
        self._joined: _Joined | None = None
        self._stale: list[_Mark] = []

    def give(self, worker: Worker, path: str) -> Any:
        """The rows of `worker`; the same views each time while the model stands here."""
        self._follow()
        part = self._part(worker, path)
        if part.seen is None:
            own = iter(part.own)
            seen = take(self.value, self._layout, worker.rows, path)
            part.seen = map_tensors(lambda view: view if (mine := next(own)) is None else mine, seen)
            part.views = tensors_in(part.seen)
            part.shared = _mark([t for t, dim in zip(part.views, self._layout, strict=False) if dim == SHARED])
        return part.seen

    def merge(self, worker: Worker, new: Any, path: str) -> None:
        """Put `new` in the rows of `worker`; a tensor of the old value, or one that the block was given, is left."""
        self._follow()
        if self._joined is not None:
            self._commit(self._joined)
        self._take_over(self._part(worker, path), new, path)
        self._parts[worker].seen = None

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
        if part is not None and _have_changed(part.shared):
            raise RowsError(_SHARED.format(path=part.path))
        for other in self._parts.values():
            other.shared = _mark([mark.tensor for mark in other.shared])
        self._follow()

    def leave(self) -> tuple[Any, bool]:
        """The value that the model goes on with, and whether blocks have put it together."""
        value = self.whole()
        if _have_changed(self._stale):
            raise EditError(_STALE.format(path=next((p.path for p in self._parts.values()), "This value")))
        return value, value is not self.value

    def _part(self, worker: Worker, path: str) -> _Part:
        part = self._parts.get(worker)
        if part is None:
            part = self._parts[worker] = _Part(worker.rows, len(self._tensors), path)
        return part

    def _has_parts(self) -> bool:
        return any(own is not None for part in self._parts.values() for own in part.own)

    def _take_over(self, part: _Part, new: Any, path: str) -> None:
        found = tensors_in(new)
        if len(found) != len(self._tensors):
            raise EditError(_FORM.format(path=path, count=len(self._tensors), given=len(found)))
        if not _are_same(constants_in(self.value), constants_in(new)):
            raise RowsError(_CONSTANTS.format(path=path))
        for i, tensor in enumerate(found):
            if tensor is not self._tensors[i] and not _is_view(tensor, part.views, i):
                part.own[i] = fit(self._tensors[i], tensor, self._layout[i], part.rows, path)

    def _join(self) -> list[torch.Tensor]:
        joined = []
        for i, whole in enumerate(self._tensors):
            parts = [(part.rows, own) for part in self._parts.values() if (own := part.own[i]) is not None]
            joined.append(join(whole, self._layout[i], parts, "") if parts else whole)
        return joined

    def _sources(self) -> list[torch.Tensor]:
        return [*self._tensors, *(own for part in self._parts.values() for own in part.own if own is not None)]

    def _follow(self) -> None:
        """Take in what was changed in place since: items of containers, and what a joined value was made of."""
        for part in self._parts.values():
            if part.seen is not None and _differ(now := tensors_in(part.seen), part.views):
                self._take_over(part, part.seen, part.path)
                part.views = now
        now = tensors_in(self.value)
        if _differ(now, self._tensors):
            self._tensors = now
            for part in self._parts.values():
                part.seen = None
        joined = self._joined
        if joined is None:
            return
        if _have_changed(joined.marks) or _differ(tensors_in(joined.value), [mark.tensor for mark in joined.marks]):
            self._commit(joined)
        elif _have_changed(joined.sources) or _differ(self._sources(), [mark.tensor for mark in joined.sources]):
            tensors = [mark.tensor for mark in joined.marks]
            for tensor, new in zip(tensors, self._join(), strict=True):
                if new is not tensor:
                    tensor.copy_(new)
            self._joined = _Joined(joined.value, _mark(tensors), _mark(self._sources()))

    def _commit(self, joined: _Joined) -> None:
        # Somebody changed the joined value: what it was made of reaches the model no more.
        kept = {id(mark.tensor) for mark in joined.marks}
        stale = [*self._stale, *(mark for mark in joined.sources if id(mark.tensor) not in kept)]
        self.replace(joined.value)
        self._stale = stale


# --- at a visit -------------------------------------------------------------------------------------------


def join_parts(visit: Visit, worker: Worker) -> None:
    """Let a block of the whole batch see what the invokes have put there."""
    scoped = (visit.scoped or {}).get(visit.kind)
    if scoped is not None and worker.rows is None:
        visit.value = scoped.whole()


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


def _mark(tensors: list[torch.Tensor]) -> list[_Mark]:
    return [_Mark(t, 0, t.clone()) if t.is_inference() else _Mark(t, t._version, None) for t in tensors]


def _have_changed(marks: list[_Mark]) -> bool:
    return any([mark.is_changed() for mark in marks])


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

_STALE = """\
{path} was changed in place by a block that had read it before another block assigned a new value there or changed the \
whole batch's: the change reaches nothing. Read it again before you change it."""
