"""Scoped: one value of a batch at one visit, as each worker with rows of its own sees and changes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import RowsError
from ._leaves import leaves_of
from ._rows import SHARED, Layout, Rows, join_views, put, take
from ._tensors import tensors_in

if TYPE_CHECKING:
    from ._worker import Worker


class _View(NamedTuple):
    rows: Rows
    seen: Any
    leaves: dict[str, torch.Tensor]
    shared: list[tuple[torch.Tensor, int]]
    copies: dict[str, tuple[torch.Tensor, int]]  # of rows that do not lie together in memory
    path: str


class Scoped:
    """The value of the whole batch, its layout, and the views that were given of it."""

    __slots__ = ("_layout", "_views", "value", "written")

    def __init__(self, value: Any, layout: Layout) -> None:
        self.value = value
        self.written = False
        self._layout = layout
        self._views: dict[Worker, _View] = {}

    def give(self, worker: Worker, path: str) -> Any:
        """The rows of `worker`; the same views each time while the model stands here."""
        known = self._views.get(worker)
        if known is None:
            seen = take(self.value, self._layout, worker.rows, path)
            leaves = leaves_of(seen)
            shared = [(leaf, _version(leaf)) for at, leaf in leaves.items() if self._layout[at] == SHARED]
            whole = leaves_of(self.value)
            copies = {at: (leaf, _version(leaf)) for at, leaf in leaves.items() if not _share_memory(leaf, whole[at])}
            known = self._views[worker] = _View(worker.rows, seen, leaves, shared, copies, path)
        return known.seen

    def merge(self, worker: Worker, new: Any, path: str) -> Any:
        """The whole value with `new` in the rows of `worker`."""
        known = self._views.pop(worker, None)
        return put(self.value, self._layout, worker.rows, known.leaves if known else {}, new, path)

    def copies(self) -> Iterator[tuple[torch.Tensor, str]]:
        """What blocks were given that shares no memory with the model: once it goes on, changes reach nothing."""
        for view in self._views.values():
            for at, (tensor, _) in view.copies.items():
                yield tensor, f"{view.path}{at}"

    def leave(self) -> Any:
        """The value that the model goes on with."""
        value = self.value
        for view in self._views.values():
            if any(_version(tensor) != version for tensor, version in view.shared):
                raise RowsError(_SHARED.format(path=view.path))
            now = leaves_of(view.seen)
            changed = [at for at, (copied, version) in view.copies.items() if _version(copied) != version]
            exchanged = now.keys() != view.leaves.keys() or any(leaf is not view.leaves[at] for at, leaf in now.items())
            if exchanged or changed:
                as_they_were = {at: leaf for at, leaf in view.leaves.items() if at not in changed}
                value = put(value, self._layout, view.rows, as_they_were, view.seen, view.path)
                self.written = True
        if any(tensor.requires_grad for tensor in tensors_in(value)) and not self.written:
            views = [(view.rows, view.seen) for view in self._views.values()]
            value = join_views(value, self._layout, views, "") if views else value
        return value


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_SHARED = """\
A tensor at {path} was changed in place by one invoke, but it is shared by all rows of the batch. Change it in \
tracer.invoke() without input, for the whole batch, or trace this input alone."""
