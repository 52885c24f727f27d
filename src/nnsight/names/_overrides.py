"""Overrides: modules that show a run more than they are given and give.

A projection is linear, so its output is the sum of the heads' results and the bias.  Where a result is asked for,
that sum stands for the projection once a block has changed something; otherwise the projection's own output does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import Linear, Module, Parameter

from .._core import INPUT, OperationPlace, current_pass, uncounted

Function = Callable[..., Any]


class _Override:
    """Stands in a run's overrides for the module `place.owner`."""

    def __init__(self, place: OperationPlace, previous: Callable[[Function], Function] | None) -> None:
        self.place = place
        self._previous = previous

    def __call__(self, plain: Function) -> Function:
        current = current_pass()
        if current is not None:
            current.see().open(self.place.owner)
        return partial(self._apply, plain if self._previous is None else self._previous(plain))

    def _apply(self, plain: Function, value: torch.Tensor) -> Any:
        raise NotImplementedError


class Given(_Override):
    """Shows the tensor that the module is given, apart from the one that whoever made it may need for its gradient."""

    def _apply(self, plain: Function, value: torch.Tensor) -> Any:
        current = current_pass()
        if current is None:
            return plain(value)
        return plain(current.touch(self.place, value.clone() if value.requires_grad else value))


class Taken(_Override):
    """Shows the tensor that the module gives, apart from the one that the model goes on with, and writes over."""

    def _apply(self, plain: Function, value: torch.Tensor) -> Any:
        current, result = current_pass(), plain(value)
        return result if current is None else current.touch(self.place, result).clone()


class Results(_Override):
    """Shows the heads' results at a projection."""

    heads: int

    def _apply(self, plain: Function, value: torch.Tensor) -> torch.Tensor:
        output = plain(value)
        current = current_pass()
        if current is None:
            return output
        results, bias = split_projection(self.place.owner, plain, value, self.heads)
        version = None if results.is_inference() else results._version
        seen = current.touch(self.place, results)
        changed = seen is not results or (version is not None and results._version != version)
        if not (changed or seen.requires_grad or version is None):
            return output
        total = seen.sum(-2) if bias is None else seen.sum(-2) + bias
        # With gradients they flow through the results; the numbers are the projection's own as long as nobody edits.
        return total if changed or version is None else output.detach() + (total - total.detach())


def show_apart(overrides: dict[Any, Any], place: OperationPlace, kind: str) -> None:
    """Let what the module `place.owner` is given, or gives, appear at `place` in this run."""
    found = overrides.get(place.owner)
    if not _is_there(found, place):
        overrides[place.owner] = (Given if kind == INPUT else Taken)(place, found)


def show_results(overrides: dict[Any, Any], place: OperationPlace, heads: int) -> None:
    """Let the heads' results at the projection `place.owner` appear at `place` in this run."""
    found = overrides.get(place.owner)
    if not _is_there(found, place):
        overrides[place.owner] = made = Results(place, found)
        made.heads = heads


def _is_there(found: Any, place: OperationPlace) -> bool:
    while found is not None:
        if isinstance(found, _Override) and found.place is place:
            return True
        found = getattr(found, "_previous", None)
    return False


def split_projection(
    projection: Module, plain: Function, mixed: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The heads' results `[batch, pos, head, d_model]`, and the bias."""
    by_head = mixed.unflatten(-1, (heads, -1))
    weight = _plain_weight(projection, mixed)
    if weight is not None:
        results = torch.einsum("...hd,hde->...he", by_head, weight.unflatten(0, (heads, -1)))
        return results, projection._parameters.get("bias")
    with uncounted():
        bias = plain(torch.zeros_like(mixed))
        alone = [_only(by_head, head).flatten(-2) for head in range(heads)]
        return torch.stack([plain(one) - bias for one in alone], -2), bias


def _only(by_head: torch.Tensor, head: int) -> torch.Tensor:
    mask = torch.zeros(by_head.shape[-2], 1, dtype=by_head.dtype, device=by_head.device)
    mask[head] = 1
    return by_head * mask


def _plain_weight(projection: Module, mixed: torch.Tensor) -> torch.Tensor | None:
    """The weight `[in, out]` of a linear map that is nothing more; None where it is (quantised, adapted)."""
    weight = projection._parameters.get("weight")
    if type(weight) is not Parameter or weight.dim() != 2 or weight.dtype != mixed.dtype or weight.is_meta:
        return None
    if type(projection).forward is Linear.forward or type(projection).__name__ == "FalconLinear":
        return weight.T
    return weight if type(projection).__name__ == "Conv1D" else None
