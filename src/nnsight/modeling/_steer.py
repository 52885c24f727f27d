"""Steered: a vector added to one of a model's values, inside a `with` statement or for good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..trace import Begin
from ._apply import Applied


class Steered(Applied):
    """What `model.steer(...)` gives: a context in which that model is steered.

    `model` is a model of its own that shares the weights and stays steered; with `inplace=True`, the one that was asked.
    """

    def __init__(self, model: Any, steered: Any) -> None:
        self.model = steered
        edits = [] if steered is model else steered._edits[-1:]
        super().__init__(model, edits, model._edits)


def steer(model: Any, vector: torch.Tensor, layer: int, site: str, strength: float, inplace: bool) -> Steered:
    """The context of `model.steer(...)`.

    Raises:
        InputError: The vector is none that can be added there.
    """
    place = model.site(site, layer)
    if place.axes[1] != "pos" or vector.dim() != len(place.axes) - 2:
        raise InputError(f"A vector of shape {list(vector.shape)} cannot be added to {place!r}, {place.axes}.")
    return Steered(model, model.edit(Steering(vector.detach() * strength, layer, site), inplace=inplace))


@dataclass(frozen=True, eq=False)
class Steering:
    """The intervention of `model.steer(...)`."""

    vector: torch.Tensor
    layer: int
    site: str

    def prepare(self, model: Any) -> list[tuple[str, Begin]]:
        """What to do in each run."""
        place = model.site(self.site, self.layer)
        return [(f"the steering of {place!r}", _Addition(place, self.vector))]


class _Addition:
    """Adds a vector to a value at each step."""

    def __init__(self, place: Any, vector: torch.Tensor) -> None:
        self._place = place
        self._vector = vector

    @property
    def change(self) -> dict[str, Any]:
        """The same as data."""
        key = f"{self._place.name}[{self._place.layer}]"
        return {
            "key": key,
            "target": self._place,
            "kind": "",
            "operation": "add",
            "value": self._vector,
            "factor": None,
        }

    def __call__(self) -> Callable[[int], None]:
        return self._act

    def _act(self, _step: int) -> None:
        live = self._place.read()
        self._place.write(live + self._vector.to(live))
