"""Layouts: which dimension of each value follows the batch, learnt from a few small forwards.

The same model runs on the rows `[a, b]`, `[a, b, c, d, b]` and `[c, d]`.  A dimension that grows from 2k to 5k
follows the batch, and the second and the last k of the second run must be equal, since they come from the same row: that
tells row-major order from any other.  A size that changes between `[a, b]` and `[c, d]` depends on the data, and a
tensor without such a dimension whose numbers change is made from all rows together; see `_selection` for what is picked.

Where something is attached to rows (images), a fourth run has two rows without it: what follows it does not grow there.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module

from ..errors import RowsError
from ._leaves import leaves_of
from ._modes import Modes
from ._pass import Override, Pass
from ._preserve import preserved_attributes, preserved_buffers, preserved_random_state
from ._rows import SHARED, UNKNOWN, Follow, Follows, Layout, Rows
from ._selection import Selection
from ._visit import INPUT, OUTPUT, RESULT, OperationPlace, Visit

if TYPE_CHECKING:
    from ._instrument import Instruments

Key = tuple[Any, str, int]  # place, kind, occurrence
Shape = tuple[int, ...]
Leaf = tuple[Key, int, str]  # with the step of a generation
Look = Callable[[Leaf, torch.Tensor], None]

_PAIR, _FIVE, _OTHERS, _BARE = [0, 1], [0, 1, 2, 3, 1], [2, 3], [0, 1, ~2, ~3]


class Probe:
    """What small forwards are made from.

    `make(rows)` gives a forward on the rows with these numbers, 0 to 3 of four different inputs.  Where something is
    attached to rows, `units` tells how much of it each of them has, and `~2` is row 2 without it; `optional` says that the
    rows may not do without.  `groups()` is how often the whole batch may stand one after the other along a dimension.
    """

    def __init__(
        self,
        make: Callable[[list[int]], Callable[[], Any]],
        units: Mapping[str, int] | None = None,
        *,
        optional: bool = False,
        groups: Callable[[], int] | None = None,
    ) -> None:
        self.make = make
        self.units = units or {}
        self.optional = optional
        self.groups = groups

    def through(self, call: Callable[[Callable[[], Any]], Any]) -> Probe:
        """The same with every forward run by `call`."""
        make = self.make
        return Probe(
            lambda rows: functools.partial(call, make(rows)), self.units, optional=self.optional, groups=self.groups
        )


class Fact(NamedTuple):
    """The dimensions of a leaf that follow the batch, and the shape that this was learnt from."""

    follows: Follows
    shape: Shape

    def fits(self, tensor: torch.Tensor, rows: Rows) -> bool:
        """Whether a leaf of a batch can have this layout."""
        shape, follows = tensor.shape, self.follows
        if len(shape) != len(self.shape) or follows is None:
            return False
        if not follows:
            return all(now == 1 for now, was in zip(shape, self.shape, strict=True) if was == 1)
        return all(rows.match(shape[follow.dim], follow) for follow in follows)


class Layouts:
    """What is known about the values of one model."""

    def __init__(self, instruments: Instruments, stepper: Any) -> None:
        self._instruments = instruments
        self._stepper = stepper
        self._known: dict[Key, dict[str, list[Fact]]] = {}
        self._places: set[Any] = set()
        self._asked: weakref.ref[Probe] | None = None

    def find(
        self, visit: Visit, kind: str, value: Any, rows: Rows, probe: Probe, overrides: dict[Any, Override]
    ) -> Layout:
        """The layout of a value of a run; what is not known yet costs three small forwards."""
        key, leaves = (visit.place, kind, visit.call), leaves_of(value)
        layout = self._recall(key, leaves, rows)
        if layout is None:
            if self._asked is None or self._asked() is not probe or visit.place not in self._places:
                self._learn(visit.place, probe, overrides)
                layout = self._recall(key, leaves, rows, newest=True)
            layout = layout or {at: self._best(key, at, leaf, rows) for at, leaf in leaves.items()}
        return layout

    def _recall(self, key: Key, leaves: dict[str, torch.Tensor], rows: Rows, *, newest: bool = False) -> Layout | None:
        layout = {}
        for at, leaf in leaves.items():
            fitting = [fact.follows for fact in self._facts(key, at) if fact.fits(leaf, rows)]
            if not fitting or (len(set(fitting)) > 1 and not newest):
                return None
            layout[at] = fitting[-1]
        return layout

    def _best(self, key: Key, at: str, leaf: torch.Tensor, rows: Rows) -> Follows:
        layout = self._recall(key, {at: leaf}, rows, newest=True)
        return UNKNOWN if layout is None else layout[at]

    def _facts(self, key: Key, at: str) -> list[Fact]:
        known = self._known.get(key) or self._known.get((*key[:2], 0)) or {}
        return known.get(at, [])

    def _learn(self, place: Any, probe: Probe, overrides: dict[Any, Override]) -> None:
        self._places.add(place)
        self._asked = weakref.ref(probe)
        places = [*self._instruments.modules(), *self._places, RESULT]
        trial = _Trial(probe, selection := Selection(self._instruments.root))
        runs = ((_PAIR, trial.look_at_two), (_FIVE, trial.look_at_five), (_OTHERS, trial.look_again))
        try:
            for rows, look in runs:
                with selection if rows is _PAIR else nullcontext():
                    self._observe(probe.make(rows), places, overrides, look)
            if probe.units:
                self._observe_bare(probe, places, overrides, trial)
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

    def _observe_bare(self, probe: Probe, places: list[Any], overrides: dict[Any, Override], trial: _Trial) -> None:
        try:
            self._observe(probe.make(_BARE), places, overrides, trial.look_at_bare)
        except Exception:
            if not probe.optional:
                raise
            trial.forget_bare()  # every row has the same of it, and it goes with the rows

    def _observe(self, call: Callable[[], Any], places: list[Any], overrides: dict[Any, Override], look: Look) -> None:
        seen: set[Leaf] = set()

        def look_at(visit: Visit) -> None:
            values = [(visit.kind, visit.value)]
            if visit.kind == OUTPUT:
                values.append((INPUT, visit.inputs))  # a cache has been filled since the call began
            for kind, value in values:
                for at, tensor in leaves_of(value).items():
                    leaf = ((visit.place, kind, visit.call), visit.step, at)
                    if leaf not in seen:
                        seen.add(leaf)
                        look(leaf, tensor)

        root = self._instruments.root
        trial = Pass(call, self._instruments, self._stepper, Modes(False, None), overrides, look_at, _nothing)
        trial.learn(keep=False)
        trial.attended.update(places)
        for place in places:
            trial.wanted_inputs[place] = trial.wanted_outputs[place] = 1
        with preserved_attributes(root), preserved_buffers(root), preserved_random_state():
            for module in root.modules():
                vars(module)["training"] = False  # dropout would make equal rows different
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
    """The shapes in the runs; numbers are compared on the spot, and kept of shared tensors only."""

    def __init__(self, probe: Probe, selection: Selection) -> None:
        self._selection = selection
        self._units = tuple(probe.units.items())
        self._groups = probe.groups or _one
        self._shapes: dict[Leaf, Shape] = {}
        self._found: dict[Leaf, Follows] = {}
        self._shared: dict[Leaf, torch.Tensor] = {}
        self._again: set[Leaf] = set()
        self._bare: dict[Leaf, Shape] | None = {} if probe.units else None
        self._picked: set[Leaf] = set()

    def look_at_two(self, leaf: Leaf, tensor: torch.Tensor) -> None:
        self._shapes[leaf] = tuple(tensor.shape)
        if self._selection.holds(tensor):
            self._picked.add(leaf)

    def look_at_five(self, leaf: Leaf, tensor: torch.Tensor) -> None:
        follows = self._found[leaf] = _follows(self._shapes.get(leaf), tensor, self._groups())
        if follows == SHARED:
            self._shared[leaf] = tensor.detach().clone()

    def look_again(self, leaf: Leaf, tensor: torch.Tensor) -> None:
        self._again.add(leaf)
        shared = self._shared.get(leaf)
        if self._shapes.get(leaf) != tuple(tensor.shape) or (shared is not None and not _same(shared, tensor)):
            self._found[leaf] = UNKNOWN

    def look_at_bare(self, leaf: Leaf, tensor: torch.Tensor) -> None:
        if self._bare is not None:
            self._bare[leaf] = tuple(tensor.shape)

    def forget_bare(self) -> None:
        self._bare = None

    def conclude(self, kin: Callable[[Any], Any]) -> Iterator[tuple[Leaf, Fact]]:
        """What was found; a value that cannot be told apart at one expert of a layer cannot be at the others."""
        everywhere = (self._again & self._shapes.keys() & self._found.keys()) - self._picked
        leaves = self._again | self._shapes.keys() | self._found.keys()
        found = {leaf: self._with_units(leaf) if leaf in everywhere else UNKNOWN for leaf in leaves}
        kinds = {leaf: (kin(leaf[0][0]), leaf[0][1], leaf[2]) for leaf in leaves}
        doubtful = {kinds[leaf] for leaf, follows in found.items() if follows is UNKNOWN}
        for leaf, follows in found.items():
            yield leaf, Fact(UNKNOWN if kinds[leaf] in doubtful else follows, self._shapes.get(leaf, ()))

    def _with_units(self, leaf: Leaf) -> Follows:
        """Whether the dimensions count rows, or what is attached to them; not two the same, whose order is not known."""
        follows = self._found[leaf]
        if not follows:
            return follows
        if self._bare is not None:
            bare = self._bare.get(leaf)
            if bare is None or len(bare) != len(self._shapes[leaf]):
                return UNKNOWN
            known = [_with_units(follow, bare[follow.dim], self._units) for follow in follows]
            if any(follow is None for follow in known):
                return UNKNOWN
            follows = tuple(follow for follow in known if follow is not None)
        return follows if len({bool(follow.units) for follow in follows}) == len(follows) else UNKNOWN


def _with_units(follow: Follow, bare: int, units: tuple[tuple[str, int], ...]) -> Follow | None:
    whole = follow.each * follow.groups
    if bare == 4 * whole:
        return follow
    return follow._replace(units=units) if bare == 2 * whole else None


def _follows(two: Shape | None, five: torch.Tensor, groups: int) -> Follows:
    if two is None or len(two) != five.dim():
        return UNKNOWN
    found = [_follow(dim, two[dim], five, groups) for dim in range(len(two)) if two[dim] != five.shape[dim]]
    known = tuple(follow for follow in found if follow is not None)
    return known if len(known) == len(found) else UNKNOWN


def _follow(dim: int, two: int, five: torch.Tensor, most: int) -> Follow | None:
    each, rest = divmod(two, 2)
    if rest or five.shape[dim] != 5 * each:
        return None
    if _has_no_numbers(five.narrow(dim, 0, 1)):
        return Follow(dim, 1, each)  # no row's can be taken for another's
    told = {n: _tells_order(five, dim, n) for n in dict.fromkeys((1, most)) if not each % n}
    certain = [groups for groups, order in told.items() if order]
    possible = [groups for groups, order in told.items() if order is not None]
    if certain:
        return Follow(dim, certain[0], each // certain[0])
    # Rows that are all alike tell the order only where each is a single entry.  Where the batch stands in groups, they do.
    if possible and (each == 1 or most > 1 or _is_constant(five)):
        return Follow(dim, possible[-1], each // possible[-1])
    return None


def _tells_order(tensor: torch.Tensor, dim: int, groups: int) -> bool | None:
    """Whether the rows differ in this order: None where the second and the last, which are the same row, do."""
    parts = tensor.unflatten(dim, (groups, 5, -1))
    first, second, last = (parts.select(dim + 1, i) for i in (0, 1, 4))
    return not torch.equal(first, second) if _same(second, last) else None


def _is_constant(tensor: torch.Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if _has_no_numbers(one):
        return True
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    return torch.allclose(one, other, rtol=1e-2, atol=1e-4, equal_nan=True)


def _has_no_numbers(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _kin(place: Any, paths: dict[Module, str]) -> Any:
    """The same for places that differ only by a number in their path: the layers of a model, a layer's experts."""
    if isinstance(place, OperationPlace):
        return _kin(place.owner, paths), place.name
    if not isinstance(place, Module):
        return place
    return re.sub(r"\b\d+\b", "*", paths.get(place, "")), type(place)


def _one() -> int:
    return 1


def _nothing() -> None:
    return None
