"""Running a forward besides the user's own without leaving a trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module

Slots = dict[str, torch.Tensor | None]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put PyTorch's random state back afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


@contextmanager
def preserved_buffers(root: Module) -> Iterator[list[torch.Tensor]]:
    """Put the module's buffers back afterwards; the list then holds those whose numbers had changed."""
    changed: list[torch.Tensor] = []
    owners = [module._buffers for module in root.modules() if isinstance(module._buffers, dict)]
    slots: list[tuple[Slots, Slots]] = [(owner, dict(owner)) for owner in owners]
    with torch._C.DisableTorchFunction():  # the numbers themselves, also where the model computes shapes only
        before = [(buffer, _version(buffer), buffer.detach().clone()) for buffer in root.buffers()]
    try:
        yield changed
    finally:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for owner, was in slots:
                _put_back(owner, was, changed)
            for buffer, version, copy in before:
                # Native batch norm writes its running statistics without counting a version.
                if _version(buffer) != version or not _same(buffer, copy):
                    changed.append(buffer)
                    buffer.copy_(copy)


@contextmanager
def preserved_attributes(root: Module) -> Iterator[None]:
    """Put what the modules hold back afterwards: some forwards keep a table, a position or a statistic."""
    attributes = Attributes(root)
    try:
        yield
    finally:
        attributes.put_back()


class Attributes:
    """What the modules of a tree hold: their attributes, parameters and buffers."""

    def __init__(self, root: Module) -> None:
        self._before = [(held, dict(held)) for module in root.modules() for held in _held_by(module)]

    def put_back(self) -> None:
        """Undo every assignment since."""
        for held, before in self._before:
            changed = [name for name, value in held.items() if before.get(name, held) is not value]
            for name in {*changed, *(before.keys() - held.keys())} - {"forward"}:
                if name in before:
                    held[name] = before[name]
                else:
                    del held[name]


def _held_by(module: Module) -> tuple[dict[str, Any], ...]:
    return vars(module), module._buffers, module._parameters


def _put_back(owner: Slots, was: Slots, changed: list[torch.Tensor]) -> None:
    now = dict(owner)
    if now.keys() == was.keys() and all(now[name] is buffer for name, buffer in was.items()):
        return
    for name in now.keys() | was.keys():
        old, new = was.get(name), now.get(name)
        if new is not old and new is not None and (old is None or not _same(old, new)):
            changed.append(new)
    owner.clear()
    owner.update(was)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if one.is_meta or one.is_quantized or one.layout is not torch.strided:
        return True  # not comparable: their versions must do
    return torch.equal(one, other) or bool(((one == other) | (one != one) & (other != other)).all())  # NaN is NaN


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
