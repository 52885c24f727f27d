"""Compiled specs: interventions as data, in the form in which a worker applies them to many requests at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn import Module

from ..errors import InputError
from ..trace import InterventionEdit

PlaceOf = Callable[[Any, str], "tuple[Module, str] | None"]
_SETS = ("set", "mean", "swap")
_ADDS = ("add", "trained")


class Width(NamedTuple):
    """What the residual stream of a worker is made of."""

    size: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class Act:
    """One change at one place: `add` and `set` of vectors `[d]` or `[position, d]`, `scale`, `project_out` of a basis `[d, k]`.

    Whether a token is changed follows from its position in the request and the length of the prompt alone, however the
    engine cuts the tokens into steps.  `rank` is the number of the change among those of its place.
    """

    key: str
    place: tuple[Module, str]
    operation: str
    value: torch.Tensor | None
    factor: float
    positions: str | tuple[int, ...]
    steps: tuple[int, ...] | None
    content: bytes
    rank: int = 0

    @property
    def is_uniform(self) -> bool:
        """Whether all generated tokens are treated alike."""
        return self.steps is None

    def chosen(self, begin: int, end: int, length: int) -> tuple[Sequence[int], Sequence[int] | None]:
        """Which of the positions from `begin` to `end` are meant, and for a value of each which of them."""
        numbers: list[int] | None = None
        if isinstance(self.positions, tuple):
            named = [(p + length if p < 0 else p, number) for number, p in enumerate(self.positions)]
            named = [(p, number) for p, number in named if begin <= p < end and (self.steps is None or 0 in self.steps)]
            numbers = [number for _, number in named]
            return [p for p, _ in named], numbers
        found = range(max(begin, length - 1) if self.positions == "last" else begin, end)
        if self.steps is None:
            return found, None
        return [p for p in found if max(p - length + 1, 0) in self.steps], None

    def check(self, length: int) -> None:
        """Refuse positions that a prompt of this length does not have.

        Raises:
            InputError: There is one.
        """
        if isinstance(self.positions, tuple):
            for position in self.positions:
                if not -length <= position < length:
                    raise InputError(f"{self.key}: row 0 has {length} tokens, and none at position {position}.")


class Compiled(NamedTuple):
    """The changes of a request, in their order; without any, it is a plain request.

    Requests with the same `salt` may share cached tokens, those of the same length only where `by_length`.
    """

    acts: tuple[Act, ...]
    salt: str
    by_length: bool


def compile_edits(edits: Iterable[Any], place_of: PlaceOf, width: Width) -> Compiled | None:
    """All of a model's edits, or None where one of them needs its own code."""
    acts: list[Act] = []
    counts: dict[tuple[Module, str], int] = {}
    for edit in edits:
        if not isinstance(edit, InterventionEdit):
            return None
        for _, begin in edit.prepare():
            change = getattr(begin, "change", None)
            act = None if change is None else _compile(Change(**change), place_of, width)
            if act is None:
                return None
            acts.append(replace(act, rank=counts.get(act.place, 0)))
            counts[act.place] = acts[-1].rank + 1
    digest = hashlib.sha256(b"".join(act.content for act in acts)).hexdigest() if acts else ""
    by_length = any(act.positions != "all" or act.steps is not None for act in acts)
    return Compiled(tuple(acts), digest, by_length)


class Change(NamedTuple):
    """What a part of an intervention says of itself."""

    key: str
    target: Any
    kind: str
    operation: str
    value: torch.Tensor | None
    factor: float | None
    positions: str | tuple[int, ...] = "all"
    rows: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None


def _compile(change: Change, place_of: PlaceOf, width: Width) -> Act | None:
    place = place_of(change.target, change.kind)
    if place is None or change.heads is not None or change.rows not in (None, (0,)):
        return None
    factor = 1.0 if change.factor is None else change.factor
    operation, value = change.operation, change.value
    if value is not None:
        value = value.detach().to(width.device, width.dtype)
        if not _fits(change, value, width.size):
            return None
    if operation in _ADDS and value is not None:
        operation, value = "add", factor * value
    elif operation in _SETS and value is not None:
        operation = "set"
    elif operation == "zero":
        operation, value = "set", torch.zeros(width.size, dtype=width.dtype, device=width.device)
    elif not (operation == "scale" or (operation == "project_out" and value is not None)):
        return None
    said = (change.key, place[1], operation, float(factor), change.positions, change.steps)
    content = hashlib.sha256(repr(said).encode())
    if value is not None:
        value = value.contiguous()
        content.update(repr(tuple(value.shape)).encode())
        content.update(value.cpu().view(torch.uint8).numpy().tobytes())
    return Act(change.key, place, operation, value, factor, change.positions, change.steps, content.digest())


def _fits(change: Change, value: torch.Tensor, size: int) -> bool:
    if change.operation == "project_out":
        return value.dim() == 2 and value.shape[0] == size
    each = isinstance(change.positions, tuple) and tuple(value.shape) == (len(change.positions), size)
    return each or tuple(value.shape) == (size,)
