"""Running a forward besides the user's own without leaving a trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import Module


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put PyTorch's random state back afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


@contextmanager
def preserved_buffers(root: Module) -> Iterator[list[torch.Tensor]]:
    """Put the module's buffers back afterwards; the list then holds those that had been changed."""
    changed: list[torch.Tensor] = []
    before = [(buffer, _version(buffer), buffer.detach().clone()) for buffer in root.buffers()]
    try:
        yield changed
    finally:
        with torch.no_grad():
            for buffer, version, copy in before:
                if _version(buffer) != version or (version is None and not torch.equal(buffer, copy)):
                    changed.append(buffer)
                    buffer.copy_(copy)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
