"""Rising batches: rows join a batch at the layer that they are edited at, so that each layer runs once for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch

from ._groups import Act, Group, Row

Member = tuple[int, Row]
"""The number of a row's group, and the row."""


class RunLayers(Protocol):
    """Runs rows with these prompts from `layer` on, where `stream` enters it, and returns what enters layer `until`.

    With `until` None, what leaves the last layer, at the positions that the metric looks at.
    """

    def __call__(
        self,
        prompts: Sequence[int],
        layer: int,
        act: Act,
        *,
        trim: bool,
        stream: torch.Tensor,
        until: int | None,
    ) -> torch.Tensor: ...


class Newest:
    """The rows behind the first `start` of a batch."""

    def __init__(self, start: int) -> None:
        self._start = start

    def unpack(self, live: torch.Tensor) -> torch.Tensor:
        """Their values in a live value."""
        return live[self._start :]

    def put(self, live: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The live value with new values of theirs."""
        return torch.cat([live[: self._start], new])


class Rising:
    """Runs of rows that join a batch on its way up.

    The forward is cut wherever rows join. With them goes a plain row, until each part of the forward has been seen to give
    it what it has in the plain run.

    Args:
        groups: What is run, in the order of the layers.
        stream: The plain run's residual stream before each layer, `[layer, prompt, pos, d_model]`.
        final: What leaves its last layer, as `run` returns it, of the first prompt.
        run: Runs some layers.
        trims: Whether the last layer's MLP may compute the last position alone.
    """

    def __init__(
        self, groups: Sequence[Group], stream: torch.Tensor, final: torch.Tensor, run: RunLayers, *, trims: bool
    ) -> None:
        self._groups = groups
        self._stream = stream
        self._final = final
        self._run = run
        self._trims = trims
        self._sound: set[tuple[int, int | None]] = set()  # parts that have been seen to

    def members(self) -> list[Member]:
        """The rows of all groups."""
        return [(number, row) for number, group in enumerate(self._groups) for row in group.rows]

    def parts(self, members: Sequence[Member]) -> list[Group]:
        """The groups of some rows, with these rows alone."""
        found = itertools.groupby(members, lambda member: member[0])
        return [self._groups[number]._replace(rows=[row for _, row in some]) for number, some in found]

    def run(self, members: Sequence[Member]) -> torch.Tensor | None:
        """What leaves the last layer, `[row, pos, d_model]`, of each of these rows.

        None where the plain row goes astray: something beside the residual stream goes from layer to layer.
        """
        parts = self.parts(members)
        spans = _spans([part.layer for part in parts])
        prompts = [] if self._sound.issuperset(spans) else [0]
        plain = len(prompts)
        rows = self._stream[parts[0].layer, :plain]
        for part, (layer, until) in zip(parts, spans, strict=True):
            start = len(prompts)
            prompts += [prompt for _, prompt in part.rows]
            numbers = torch.tensor(prompts[start:])
            rows = torch.cat([rows, self._stream[layer][numbers.to(rows.device)]])
            act = part.edit([what for what, _ in part.rows], numbers, Newest(start))
            trim = self._trims and part.before_mlp
            rows = self._run(prompts, layer, act, trim=trim, stream=rows, until=until)
            if plain and not close(rows[:1], self._expected(until)):
                return None
            self._sound.add((layer, until))
        return rows[plain:]

    def is_sound(self) -> bool:
        """Whether a plain row has what it should wherever a group starts, and at the end."""
        for layer, until in _spans(sorted({group.layer for group in self._groups} - {0})):
            rows = self._stream[layer, :1]
            rows = self._run([0], layer, _nothing, trim=self._trims, stream=rows, until=until)
            if not close(rows, self._expected(until)):
                return False
        return True

    def _expected(self, layer: int | None) -> torch.Tensor:
        """What enters a layer in the plain run, of the first prompt."""
        return self._final if layer is None else self._stream[layer, :1]


def _spans(layers: Sequence[int]) -> list[tuple[int, int | None]]:
    """Each of these layers and the next one, None for the end."""
    return list(zip(layers, [*layers[1:], None], strict=False))


def _nothing() -> None:
    """An edit that changes nothing."""


def can_rise(groups: Sequence[Group]) -> bool:
    """Whether each group is edited no more where the next one joins."""
    ends = [group.last for group in groups if group.last is not None]
    return len(ends) == len(groups) and all(end < group.layer for end, group in zip(ends, groups[1:], strict=False))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two ways to compute the same came to the same."""
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    atol = tolerance * float(expected.abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=atol)
