"""Check: whether a family's row holds for the model at hand, on a trial forward.

Each layer is read once, in the order of the vocabulary, and what the row says about its values is computed: the stream
adds up, the heads' results are the attention's output, the pattern mixes the values.  In a scan, shapes are looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .._core import Fakes, Worker
from ..errors import NamesError, NNsightError
from ._access import Access, Operation, Whole
from ._family import Attention, Spot
from ._identities import Identities
from ._shapes import HeadsFirst
from ._terms import AXES, LAYER, MODULES
from ._trial import trial, trial_inputs

if TYPE_CHECKING:
    from ._stack import Stack
    from ._vocabulary import Vocabulary

Values = dict[str, torch.Tensor]
_KINDS = ("input", "output")


class _Unreadable(Exception):
    """One name could not be read on the trial."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason


def check_stack(names: Vocabulary, stack: Stack, fakes: Fakes | None, inputs: dict[str, Any] | None) -> dict[str, str]:
    """For each name that does not hold, what was found instead."""
    failures: dict[str, str] = {}
    everything = [*AXES, *MODULES]
    try:
        given = inputs or trial_inputs(names.model, names.config)
    except (NamesError, AttributeError) as error:
        return dict.fromkeys(everything, f"no trial forward could be made: {error}")
    for _ in everything:
        try:
            with trial(names.tree.instruments, given, fakes) as worker:
                _Check(stack, worker, failures, fakes is None).all()
            return failures
        except _Unreadable as found:
            failures[found.name] = found.reason  # the forward is over: begin again without that name
        except NNsightError:
            raise
        except Exception as error:
            reason = f"the trial forward failed with {type(error).__name__}: {error}"
            return dict.fromkeys(everything, reason)
    return failures


class _Check:
    """One pass over the layers of a stack."""

    def __init__(self, stack: Stack, worker: Worker, failures: dict[str, str], numbers: bool) -> None:
        self._stack = stack
        self._worker = worker
        self._failures = failures
        self._numbers = numbers
        self._sizes: dict[str, int] = {}
        self._identities = Identities(stack, self._fail)

    def all(self) -> None:
        stack, row = self._stack, self._stack.row
        entering = [value for path in self._entry() if (value := self._whole("embed", path)) is not None]
        last: torch.Tensor | None = None
        for index in range(len(stack)):
            values = self._layer(index)
            if self._numbers:
                if index == 0:
                    self._identities.entry(entering, values)
                elif last is not None:
                    self._identities.passed_on(last, values)
                self._identities.stream(index, values)
                for prefix, attention in (("head_", row.heads), ("cross_head_", row.cross_heads)):
                    if attention is not None:
                        self._identities.heads(index, prefix, attention, values)
            last = values.get("resid_post")
        self._end(last)

    # --- reading -------------------------------------------------------------------------------------------------

    def _entry(self) -> tuple[str, ...]:
        row = self._stack.row
        if row.entry is not None:
            return row.entry
        return () if row.embed is None else (row.embed,)

    def _layer(self, index: int) -> Values:
        values: Values = {}
        for name, access in self._accesses(index):
            if _name(name) not in self._failures:
                found = values[name] = self._read(name, access, index)
                if name in AXES:
                    self._check_shape(name, found)
        return values

    def _accesses(self, index: int) -> list[tuple[str, Access]]:
        """What is read of a layer, in order: the names that it has, and what they are compared with."""
        stack, found = self._stack, []
        norms = iter(stack.row.norms)
        for name in LAYER:
            access = _access_at(stack, name, index)
            if access is None:
                continue
            prefix, _, what = name.rpartition("head_")
            row = stack.row.cross_heads if prefix else stack.row.heads
            if what == "q_rot" and row is not None:
                found += self._rotated(name.removesuffix("q_rot"), row)
            elif what == "pattern" and row is not None:
                found += self._arguments(name.removesuffix("pattern"), row)
            found.append((name, access))
            if what == "result" and row is not None:
                found.append((f"{name} projected", Access(stack, name, Spot.parse(f"{row.out}.output"))))
            elif name in ("attn_out", "cross_out", "mlp_out") and (norm := next(norms, None)) is not None:
                found += [
                    (f"{name} {norm} {kind}", Access(stack, name, Spot.parse(f"{norm}.{kind}"))) for kind in _KINDS
                ]
        return found

    def _rotated(self, prefix: str, row: Attention) -> list[tuple[str, Access]]:
        """Queries and keys before they are rotated, where one operation does it to both."""
        spots = [Spot.parse(text) for text in (row.q_rot, row.k_rot) if text is not None]
        if len({spot.path for spot in spots}) != 1 or spots[0].kind != "output":
            return []
        names = [f"{prefix}{what} unrotated" for what in "qk"]
        spots = [spot._replace(kind="input") for spot in spots]
        return [(n, Operation(self._stack, n, row, s, HeadsFirst())) for n, s in zip(names, spots, strict=True)]

    def _arguments(self, prefix: str, row: Attention) -> list[tuple[str, Access]]:
        """Queries and keys as the attention function is given them."""
        if row.call is None:
            return []
        found: list[tuple[str, Access]] = []
        for what, item, same in zip("qk", row.call_items, (row.q_rot, row.k_rot), strict=False):
            spot, name = Spot(row.call, "input", item, True), f"{prefix}{what} given"
            if same is None or Spot.parse(same) != spot:
                found.append((name, Operation(self._stack, name, row, spot, HeadsFirst())))
        return found

    def _read(self, name: str, access: Access, index: int) -> torch.Tensor:
        try:
            return access.read(self._worker, index)
        except NNsightError as error:
            raise _Unreadable(_name(name), f"{access.path(index)} cannot be read: {error}") from None

    def _whole(self, name: str, path: str) -> torch.Tensor | None:
        stack = self._stack
        return None if name in self._failures else self._read(name, Whole(stack, name, stack.below_base(path)), 0)

    # --- the end of the forward --------------------------------------------------------------------------------

    def _end(self, last: torch.Tensor | None) -> None:
        row = self._stack.row
        normed = entering = None
        if row.final_norm is not None and self._stack.has("final_norm"):
            normed = self._whole("final_norm", row.final_norm)
            entering = self._input_of("final_norm")
        if self._numbers:
            self._identities.final(last, entering)
        if row.unembed is None or not self._stack.has("unembed") or "logits" in self._failures:
            return
        given = self._input_of("unembed")
        out = self._read("unembed", Whole(self._stack, "unembed", self._stack.path_of("unembed")), 0)
        logits = self._read("logits", self._stack.access("logits"), 0)
        self._check_shape("logits", logits)
        if self._numbers:
            self._identities.head(normed, given, out, logits)

    def _input_of(self, name: str) -> torch.Tensor | None:
        if name in self._failures:
            return None
        return self._read(name, Whole(self._stack, name, self._stack.path_of(name), kind="input"), 0)

    # --- verdicts ------------------------------------------------------------------------------------------------

    def _fail(self, names: list[str], reason: str) -> None:
        for name in names:
            self._failures.setdefault(name, reason)

    def _check_shape(self, name: str, value: torch.Tensor) -> None:
        axes, shape = AXES[name], value.shape
        if len(shape) != len(axes):
            self._fail([name], f"its shape was {list(shape)}, not {list(axes)}")
            return
        sizes = dict(zip(axes, shape, strict=True))
        if name == "resid_pre":
            self._sizes = {**dict.fromkeys(("pos", "query", "key"), sizes["pos"]), "batch": sizes["batch"]}
        of_encoder = ("pos", "key") if name.startswith("cross_head") else ()
        expected = {axis: size for axis, size in self._sizes.items() if axis not in of_encoder}
        wrong = [axis for axis, size in expected.items() if sizes.get(axis, size) != size]
        if wrong:
            self._fail([name], f"its shape was {list(shape)}, where {wrong[0]} is {expected[wrong[0]]}")


def _name(name: str) -> str:
    """The name that something read beside it belongs to: `head_q` for `head_q unrotated`."""
    return name.partition(" ")[0]


def _access_at(stack: Stack, name: str, index: int) -> Access | None:
    """The access of a name, None where the layer has no such value."""
    try:
        access = stack.access(name)
        access.module(index)
    except NamesError:
        return None
    return access
