"""Barrier: a point that a number of blocks reach before any of them goes on."""

from __future__ import annotations

from .._core import find_worker
from ..errors import NotTracingError


class Barrier:
    """What `tracer.barrier(n)` gives; each of `n` blocks calls it.

    Example:
        >>> from nnsight import LanguageModel
        >>> model = LanguageModel("nnsight/landmarks")
        >>> with model.trace() as tracer:
        ...     barrier = tracer.barrier(2)
        ...     with tracer.invoke("The Eiffel Tower is in"):
        ...         embeddings = model.transformer.wte.output
        ...         barrier()
        ...     with tracer.invoke("_ _ _ _ _ _"):
        ...         barrier()
        ...         model.transformer.wte.output = embeddings
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._arrived = 0

    def __call__(self) -> None:
        worker = find_worker()
        if worker is None:
            raise NotTracingError("A barrier is called by the blocks of a trace; no block is running here.")
        self._arrived += 1
        turn = -(-self._arrived // self._count) * self._count  # the arrival that completes this round
        worker.run.wait(
            worker,
            lambda: self._arrived >= turn,
            lambda: f"barrier({self._count}), which {self._arrived} of {self._count} blocks reached",
        )
