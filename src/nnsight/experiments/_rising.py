"""Rising batches: rows join a batch at the layer that they are edited at, so that each layer runs once for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

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


class _Stage(NamedTuple):
    """The layers from one where rows join to the next such one; None for the end."""

    group: Group
    rows: Sequence[Row]
    until: int | None


def can_rise(groups: Sequence[Group]) -> bool:
    """Whether each group is edited no more where the next one joins."""
    return all(
        group.last is not None and group.last < following.layer for group, following in itertools.pairwise(groups)
    )


def rise(
    groups: Sequence[Group], members: Sequence[Member], stream: torch.Tensor, final: torch.Tensor, run: RunLayers
) -> torch.Tensor | None:
    """What leaves the last layer, `[row, pos, d_model]`, of each of these rows.

    The forward is cut wherever rows join. With them goes a plain row, which must have at each cut what the plain run has
    there: None where it does not, because something beside the residual stream goes from layer to layer.

    Args:
        groups: All groups, in the order of their layers.
        members: Which of their rows to run, group by group.
        stream: The plain run's residual stream before each layer, `[layer, prompt, pos, d_model]`.
        final: What leaves its last layer, as `run` returns it, of the first prompt.
        run: Runs some layers.
    """
    prompts = [0]
    rows = stream[groups[members[0][0]].layer, :1]
    for group, joining, until in _stages(groups, members):
        start = len(prompts)
        prompts += [prompt for _, prompt in joining]
        numbers = torch.tensor(prompts[start:])
        rows = torch.cat([rows, stream[group.layer][numbers.to(stream.device)]])
        act = group.edit([what for what, _ in joining], numbers, Newest(start))
        rows = run(prompts, group.layer, act, trim=group.before_mlp, stream=rows, until=until)
        if not close(rows[:1], final if until is None else stream[until, :1]):
            return None
    return rows[1:]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two ways to compute the same came to the same."""
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    atol = tolerance * float(expected.abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=atol)


def _stages(groups: Sequence[Group], members: Sequence[Member]) -> Iterator[_Stage]:
    parts = [(number, list(some)) for number, some in itertools.groupby(members, lambda member: member[0])]
    ends: list[int | None] = [groups[number].layer for number, _ in parts[1:]]
    for (number, some), until in zip(parts, [*ends, None], strict=True):
        yield _Stage(groups[number], [row for _, row in some], until)
