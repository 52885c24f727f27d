"""Layouts: which dimension of each value follows the batch, learnt from three small forwards.

The same model runs on the rows `[a, b]`, `[a, b, c, d, a]` and `[c, d]`.  A dimension that grows from 2k to 5k
follows the batch, and the first and the last k of the second run must be equal, since they come from the same row: that
tells row-major order from any other.  A size that changes between `[a, b]` and `[c, d]` depends on the data, and a
tensor without such a dimension whose numbers change is made from all rows together.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module

from ..errors import RowsError
from ._leaves import leaves_of
from ._modes import Modes
from ._pass import Override, Pass
from ._preserve import preserved_attributes, preserved_buffers, preserved_random_state
from ._rows import SHARED, UNKNOWN, Layout
from ._visit import RESULT, OperationPlace, Visit

if TYPE_CHECKING:
    from ._instrument import Instruments

Key = tuple[Any, str, int]  # place, kind, occurrence
Probe = Callable[[list[int]], Callable[[], Any]]
Shape = tuple[int, ...]
Leaf = tuple[Key, int, str]  # with the step of a generation
Look = Callable[[Leaf, torch.Tensor], None]

_PAIR, _FIVE, _OTHERS = [0, 1], [0, 1, 2, 3, 0], [2, 3]


class Fact(NamedTuple):
    """The dimension of a leaf that follows the batch, and the shape that this was learnt from."""

    dim: int
    shape: Shape

    def fits(self, tensor: torch.Tensor, total: int) -> bool:
        """Whether a leaf of a batch of `total` rows can have this layout."""
        shape = tensor.shape
        if len(shape) != len(self.shape) or self.dim == UNKNOWN:
            return False
        if self.dim == SHARED:
            return all(now == 1 for now, was in zip(shape, self.shape, strict=True) if was == 1)
        return shape[self.dim] > 0 and shape[self.dim] % total == 0


class Layouts:
    """What is known about the values of one model.

    `probe(rows)` gives a forward on the rows with these numbers (0 to 3) of four different inputs.
    """

    def __init__(self, instruments: Instruments, stepper: Module) -> None:
        self._instruments = instruments
        self._stepper = stepper
        self._known: dict[Key, dict[str, list[Fact]]] = {}
        self._places: set[Any] = set()
        self._asked: weakref.ref[Probe] | None = None

    def find(
        self, visit: Visit, kind: str, value: Any, total: int, probe: Probe, overrides: dict[Any, Override]
    ) -> Layout:
        """The layout of a value of a run; what is not known yet costs three small forwards."""
        key, leaves = (visit.place, kind, visit.call), leaves_of(value)
        layout = self._recall(key, leaves, total)
        if layout is None:
            if self._asked is None or self._asked() is not probe or visit.place not in self._places:
                self._learn(visit.place, probe, overrides)
                layout = self._recall(key, leaves, total, newest=True)
            layout = layout or {at: self._best(key, at, leaf, total) for at, leaf in leaves.items()}
        return layout

    def _recall(self, key: Key, leaves: dict[str, torch.Tensor], total: int, *, newest: bool = False) -> Layout | None:
        layout = {}
        for at, leaf in leaves.items():
            dims = [fact.dim for fact in self._facts(key, at) if fact.fits(leaf, total)]
            if not dims or (len(set(dims)) > 1 and not newest):
                return None
            layout[at] = dims[-1]
        return layout

    def _best(self, key: Key, at: str, leaf: torch.Tensor, total: int) -> int:
        layout = self._recall(key, {at: leaf}, total, newest=True)
        return UNKNOWN if layout is None else layout[at]

    def _facts(self, key: Key, at: str) -> list[Fact]:
        known = self._known.get(key) or self._known.get((*key[:2], 0)) or {}
        return known.get(at, [])

    def _learn(self, place: Any, probe: Probe, overrides: dict[Any, Override]) -> None:
        self._places.add(place)
        self._asked = weakref.ref(probe)
        places = [*self._instruments.modules(), *self._places, RESULT]
        trial = _Trial()
        try:
            for rows, look in ((_PAIR, trial.look_at_two), (_FIVE, trial.look_at_five), (_OTHERS, trial.look_again)):
                self._observe(probe(rows), places, overrides, look)
        except Exception as error:
            raise RowsError(
                "Telling the rows of several invokes apart needs small trial runs of the model, and one failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        paths = {module: name for name, module in self._instruments.root.named_modules()}
        for (key, _, at), fact in trial.conclude(lambda place: _kin(place, paths)):
            facts = self._known.setdefault(key, {}).setdefault(at, [])
            if fact in facts:
                facts.remove(fact)
            facts.append(fact)

    def _observe(self, call: Callable[[], Any], places: list[Any], overrides: dict[Any, Override], look: Look) -> None:
        def look_at(visit: Visit) -> None:
            for at, leaf in leaves_of(visit.value).items():
                look(((visit.place, visit.kind, visit.call), visit.step, at), leaf.detach())

        root = self._instruments.root
        trial = Pass(call, self._instruments, self._stepper, Modes(False, None), overrides, look_at, _nothing)
        trial.learn(keep=False)
        trial.attended.update(places)
        for place in places:
            trial.wanted_inputs[place] = trial.wanted_outputs[place] = 1
        with preserved_attributes(root), preserved_buffers(root), preserved_random_state():
            trial.advance()
        error, trial.error = trial.error, None
        trial.close()
        if error is None:
            return
        try:
            raise error
        finally:
            del error  # its traceback holds this frame


class _Trial:
    """The shapes in the three runs; numbers are compared on the spot, and kept of shared tensors only."""

    def __init__(self) -> None:
        self._shapes: dict[Leaf, Shape] = {}
        self._dims: dict[Leaf, int] = {}
        self._shared: dict[Leaf, torch.Tensor] = {}
        self._again: set[Leaf] = set()

    def look_at_two(self, leaf: Leaf, tensor: torch.Tensor) -> None:
        self._shapes[leaf] = tuple(tensor.shape)

    def look_at_five(self, leaf: Leaf, tensor: torch.Tensor) -> None:
        dim = self._dims[leaf] = _dimension(self._shapes.get(leaf), tensor)
        if dim == SHARED:
            self._shared[leaf] = tensor.clone()

    def look_again(self, leaf: Leaf, tensor: torch.Tensor) -> None:
        self._again.add(leaf)
        shared = self._shared.get(leaf)
        if self._shapes.get(leaf) != tuple(tensor.shape) or (shared is not None and not _same(shared, tensor)):
            self._dims[leaf] = UNKNOWN

    def conclude(self, kin: Callable[[Any], Any]) -> Iterator[tuple[Leaf, Fact]]:
        """What was found; a value that cannot be told apart at one expert of a layer cannot be at the others."""
        everywhere = self._again & self._shapes.keys() & self._dims.keys()
        leaves = self._again | self._shapes.keys() | self._dims.keys()
        dims = {leaf: self._dims[leaf] if leaf in everywhere else UNKNOWN for leaf in leaves}
        kinds = {leaf: (kin(leaf[0][0]), leaf[0][1], leaf[2]) for leaf in leaves}
        doubtful = {kinds[leaf] for leaf, dim in dims.items() if dim == UNKNOWN}
        for leaf, dim in dims.items():
            yield leaf, Fact(UNKNOWN if kinds[leaf] in doubtful else dim, self._shapes.get(leaf, ()))


def _dimension(two: Shape | None, five: torch.Tensor) -> int:
    if two is None or len(two) != five.dim():
        return UNKNOWN
    differing = [d for d in range(len(two)) if two[d] != five.shape[d]]
    if not differing:
        return SHARED
    dim = differing[0]
    each, rest = divmod(two[dim], 2)
    if len(differing) > 1 or rest or five.shape[dim] != 5 * each:
        return UNKNOWN
    return dim if _is_row_major(five, dim, each) else UNKNOWN


def _is_row_major(tensor: torch.Tensor, dim: int, each: int) -> bool:
    if isinstance(tensor, FakeTensor):
        return True  # without numbers no row's can be taken for another's
    first, second, last = (tensor.narrow(dim, i * each, each) for i in (0, 1, 4))
    if not _same(first, last):
        return False
    # Rows that are all alike tell the order only where each is a single entry.
    return each == 1 or not (torch.equal(first, second) and bool((first != first.flatten()[0]).any()))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if isinstance(one, FakeTensor) or one.is_meta:
        return True
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    return torch.allclose(one, other, rtol=1e-2, atol=1e-4, equal_nan=True)


def _kin(place: Any, paths: dict[Module, str]) -> Any:
    """The same for places that differ only by a number in their path: the layers of a model, a layer's experts."""
    if isinstance(place, OperationPlace):
        return _kin(place.owner, paths), place.name
    if not isinstance(place, Module):
        return place
    return re.sub(r"\b\d+\b", "*", paths.get(place, "")), type(place)


def _nothing() -> None:
    return None
