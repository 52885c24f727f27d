"""Steered: a vector added to one of a model's values, inside a `with` statement or for good."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError
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
    change = vector.detach() * strength
    with model.edit(inplace=inplace) as steered:
        live = model.site(site, layer).read()
        model.site(site, layer).write(live + change.to(live))
    return Steered(model, steered)
