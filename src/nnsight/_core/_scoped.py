"""Scoped: one value of a batch at one visit, as each worker with rows of its own sees and changes it."""

from __future__ import annotations

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
            known = self._views[worker] = _View(worker.rows, seen, leaves, shared, path)
        return known.seen

    def merge(self, worker: Worker, new: Any, path: str) -> Any:
        """The whole value with `new` in the rows of `worker`."""
        known = self._views.pop(worker, None)
        return put(self.value, self._layout, worker.rows, known.leaves if known else {}, new, path)

    def leave(self) -> Any:
        """The value that the model goes on with."""
        value = self.value
        for view in self._views.values():
            if any(_version(tensor) != version for tensor, version in view.shared):
                raise RowsError(_SHARED.format(path=view.path))
            now = leaves_of(view.seen)
            if now.keys() != view.leaves.keys() or any(leaf is not view.leaves[at] for at, leaf in now.items()):
                value = put(value, self._layout, view.rows, view.leaves, view.seen, view.path)
                self.written = True
        if any(tensor.requires_grad for tensor in tensors_in(value)) and not self.written:
            views = [(view.rows, view.seen) for view in self._views.values()]
            value = join_views(value, self._layout, views, "") if views else value
        return value


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_SHARED = """\
A tensor at {path} was changed in place by one invoke, but it is shared by all rows of the batch. Change it in \
tracer.invoke() without input, for the whole batch, or trace this input alone."""
