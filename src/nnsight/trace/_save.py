"""`save`: what leaves a trace, and a warning when a saved tensor is changed afterwards."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch

from .._core import Run, active, find_worker, tensors_in, user_frame
from ..errors import SavedValueChangedWarning

T = TypeVar("T")

_collected: ContextVar[list[Any] | None] = ContextVar("nnsight_saves", default=None)


@contextmanager
def collecting_saves() -> Iterator[list[Any]]:
    """Every value that is saved in this context, and in the blocks begun in it, goes into the list."""
    saves: list[Any] = []
    token = _collected.set(saves)
    try:
        yield saves
    finally:
        _collected.reset(token)


class Saved(NamedTuple):
    """A tensor as it was when it was saved; a part of another shares its version with the whole, so it has sums too."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    sums: torch.Tensor | None
    filename: str
    line: int

    def has_changed(self) -> bool:
        tensor = self.tensor()
        if tensor is None or tensor._version == self.version:
            return False
        return self.sums is None or not torch.equal(self.sums, _sums(tensor))


def save(value: T) -> T:
    """Mark a value as one that leaves the trace, and return it.

    A local trace runs in the user's own frame, so the value is simply itself.  Where a saved tensor is changed
    in place later in the same trace (by an edit, or by the model), a `SavedValueChangedWarning` says so at
    the end of the trace: the saved tensor is the live one, no copy, so that gradients can be had for it.

    Example:
        >>> import torch, nnsight
        >>> model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(3, 2)))
        >>> with model.trace(torch.ones(1, 3)):
        ...     out = nnsight.save(model[0].output)
        >>> out.shape
        torch.Size([1, 2])

    Args:
        value: Anything: a tensor, a container, a number.

    Returns:
        `value` itself.
    """
    saves = _collected.get()
    if saves is not None:
        saves.append(value)
    worker = active.get()
    if worker is not None and worker.instruments is None:
        worker = find_worker()
    if worker is not None:
        frame = user_frame()
        if frame is not None:
            place = (frame.f_code.co_filename, frame.f_lineno)
            worker.run.saved += [
                Saved(weakref.ref(tensor), tensor._version, _sums(tensor) if _is_part(tensor) else None, *place)
                for tensor in tensors_in(value)
                if not tensor.is_inference()
            ]
    return value


def warn_about_changes(run: Run) -> None:
    """Say which saved tensors were changed in place after they were saved."""
    for saved in run.saved:
        if saved.has_changed():
            warnings.warn_explicit(
                "a tensor saved here was changed in place afterwards, by an edit or by the model, and holds the "
                "changed numbers. To keep the earlier ones, save a copy: value.clone().save()",
                SavedValueChangedWarning,
                saved.filename,
                saved.line,
            )
    run.saved.clear()


def _is_part(tensor: torch.Tensor) -> bool:
    base = tensor._base
    return base is not None and base.numel() != tensor.numel()


def _sums(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        values = tensor.detach().to(torch.float64) if not tensor.is_complex() else torch.view_as_real(tensor).double()
        return torch.stack([values.sum(), values.square().sum(), values.nan_to_num().abs().sum()]).nan_to_num(nan=-1.0)
