"""Layouts: which dimension of each value follows the batch, learnt from three small forwards.

The same model runs on the rows `[a, b]`, `[a, b, a]` and `[b, b]`.  A dimension that grows from 2k to 3k follows
the batch; where k > 1 (tokens of all rows in one dimension, or heads) the first and last third must be
equal, since they come from the same row: that tells row-major order from any other.  A size that changes between
`[a, b]` and `[b, b]` depends on the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import RowsError
from ._modes import Modes
from ._pass import Override, Pass
from ._preserve import preserved_buffers, preserved_random_state
from ._rows import SHARED, UNKNOWN, Layout
from ._tensors import tensors_in
from ._visit import RESULT, Visit

if TYPE_CHECKING:
    from torch.nn import Module

    from ._instrument import Instruments

Key = tuple[Any, str, int]  # place, kind, occurrence
Probe = Callable[[list[int]], Callable[[], Any]]

_BATCHES = ([0, 1], [0, 1, 0], [1, 1])


class Layouts:
    """What is known about the values of one model.

    `probe(rows)` gives a forward on the rows with these numbers (0 and 1) of two different inputs.
    """

    def __init__(self, instruments: Instruments, stepper: Module) -> None:
        self._instruments = instruments
        self._stepper = stepper
        self._known: dict[Key, Layout] = {}
        self._places: set[Any] = set()

    def find(self, visit: Visit, kind: str, value: Any, probe: Probe, overrides: dict[Any, Override]) -> Layout:
        """The layout of a value of a run; the first question costs three small forwards."""
        key = (visit.place, kind, visit.call)
        found = self._known.get(key) or self._known.get((visit.place, kind, 0))
        if found is None:
            self._learn(visit.place, probe, overrides)
            found = self._known.get(key) or self._known.get((visit.place, kind, 0))
        count = len(tensors_in(value))
        if found is None or len(found) < count:
            return [UNKNOWN] * count
        return found

    def _learn(self, place: Any, probe: Probe, overrides: dict[Any, Override]) -> None:
        self._places.add(place)
        places = [*self._instruments.modules(), *self._places, RESULT]
        try:
            with preserved_buffers(self._instruments.root), preserved_random_state():
                first, second, third = (self._observe(probe(rows), places, overrides) for rows in _BATCHES)
        except Exception as error:
            raise RowsError(
                "Telling the rows of several invokes apart needs small trial runs of the model, and one failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        for key, tensors in first.items():
            others = second.get(key), third.get(key)
            self._known[key] = [_dimension(i, tensors, *others) for i in range(len(tensors))]

    def _observe(
        self, call: Callable[[], Any], places: list[Any], overrides: dict[Any, Override]
    ) -> dict[Key, list[torch.Tensor]]:
        seen: dict[Key, list[torch.Tensor]] = {}

        def look(visit: Visit) -> None:
            seen[visit.place, visit.kind, visit.call] = [t.detach().clone() for t in tensors_in(visit.value)]

        trial = Pass(call, self._instruments, self._stepper, Modes(False, None), overrides, look, _nothing)
        trial.learn(keep=False)
        trial.attended.update(places)
        for place in places:
            trial.wanted_inputs[place] = trial.wanted_outputs[place] = 1
        trial.advance()
        error, trial.error = trial.error, None
        trial.close()
        if error is None:
            return seen
        try:
            raise error
        finally:
            del error  # its traceback holds this frame


def _dimension(
    i: int, first: list[torch.Tensor], second: list[torch.Tensor] | None, third: list[torch.Tensor] | None
) -> int:
    if second is None or third is None or not len(first) == len(second) == len(third):
        return UNKNOWN
    two, three, again = first[i], second[i], third[i]
    if two.shape != again.shape or two.dim() != three.dim():
        return UNKNOWN
    differing = [d for d in range(two.dim()) if two.shape[d] != three.shape[d]]
    if not differing:
        return SHARED
    dim = differing[0]
    each, rest = divmod(two.shape[dim], 2)
    if len(differing) > 1 or rest or three.shape[dim] != 3 * each:
        return UNKNOWN
    return dim if each == 1 or _is_row_major(three, dim, each) else UNKNOWN


def _is_row_major(tensor: torch.Tensor, dim: int, each: int) -> bool:
    if isinstance(tensor, FakeTensor):
        return True  # without numbers no row's can be taken for another's
    begin, middle, end = (tensor.narrow(dim, i * each, each) for i in range(3))
    if not tensor.is_floating_point():
        return bool(begin.equal(end))
    close = torch.allclose(begin, end, rtol=1e-2, atol=1e-4, equal_nan=True)
    return close and not (torch.equal(begin, middle) and bool(begin.std() > 0))


def _nothing() -> None:
    return None
