"""Barrier: a point that a number of blocks reach before any of them goes on."""

from __future__ import annotations

import weakref

from .._core import Run, worker_of
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

    def __init__(self, count: int, run: Run) -> None:
        self._count = count
        self._run = weakref.ref(run)
        self._arrived = 0

    def __call__(self) -> None:
        run = self._run()
        worker = worker_of(run) if run is not None else None
        if worker is None:
            raise NotTracingError(
                "A barrier is called by the blocks of the trace that made it; none of them is running here. Make one where it "
                "is needed: `barrier = tracer.barrier(n)`."
            )
        self._arrived += 1
        turn = -(-self._arrived // self._count) * self._count  # the arrival that completes this round
        worker.run.wait(worker, lambda: self._arrived >= turn, lambda: self._describe(turn))

    def _describe(self, turn: int) -> str:
        came = self._arrived - turn + self._count
        return (
            f"barrier({self._count}), which {came} of {self._count} blocks reached. Call it in each block that is to meet the "
            "others, and as often in each; tracer.barrier(n) takes their number."
        )
