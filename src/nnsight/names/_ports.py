"""Ports: tensors of a module shown at places of their own, in the vocabulary's shape, in the course of its call.

What a block is handed there is what the model goes on with, also for gradients: it is put back into the form that the
model expects from what the block was shown, not from the tensor that this was made of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from .._core import INPUT, OperationPlace, Pass, current_pass
from ._project import split_projection
from ._shapes import Shape

Function = Callable[..., Any]
Keep = Literal["shared", "own", "left", "held"]


class Showing(NamedTuple):
    """One tensor shown.

    `keep` says whose it is: `shared` by block and model; their `own`, apart from the one that whoever made it needs for its
    gradient; `left` to the block, since the model writes over it later; `held` by the model, which uses it elsewhere too
    and has every change copied into it.
    """

    place: OperationPlace
    shape: Shape
    keep: Keep
    rank: int


def show(current: Pass, showing: Showing, tensor: torch.Tensor) -> torch.Tensor:
    """Let a tensor appear at a place; gives the one that the model goes on with."""
    place, shape, keep, _ = showing
    own = tensor.clone() if tensor.requires_grad and keep in ("own", "held") else tensor
    shown = shape.show(own)
    seen = current.touch(place, shown)
    untouched = seen is shown and shown.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    changed = tensor if untouched and not seen.requires_grad else shape.take(own, seen)
    if keep == "left":
        return changed.clone()
    return tensor.copy_(changed) if keep == "held" and changed is not tensor else changed


class Port:
    """Stands in a run's overrides for a module, and shows what it is given, what it gives, and its heads' results."""

    def __init__(self, owner: Any, previous: Callable[[Function], Function] | None) -> None:
        self._owner = owner
        self._previous = previous
        self._given: list[Showing] = []
        self._taken: list[Showing] = []
        self._results: tuple[OperationPlace, int] | None = None

    def show(self, kind: str, showing: Showing) -> None:
        """Show the module's input, or its output, too; those of one kind in the order of their ranks."""
        showings = self._given if kind == INPUT else self._taken
        if showing not in showings:
            showings.append(showing)
            showings.sort(key=lambda found: found.rank)

    def show_results(self, place: OperationPlace, heads: int) -> None:
        """Show what each of so many heads adds to the projection's output."""
        self._results = place, heads

    def __call__(self, plain: Function) -> Function:
        current = current_pass()
        if current is not None:
            current.see().open(self._owner)
        return partial(self._apply, plain if self._previous is None else self._previous(plain))

    def _apply(self, plain: Function, value: Any, *args: Any, **kwargs: Any) -> Any:
        current = current_pass()
        if current is None:
            return plain(value, *args, **kwargs)
        value = _show_all(current, self._given, value)
        result = plain(value, *args, **kwargs)
        if self._results is not None:
            result = self._show_results(current, plain, value, result, *self._results)
        return _show_all(current, self._taken, result)

    def _show_results(
        self,
        current: Pass,
        plain: Function,
        mixed: torch.Tensor,
        output: torch.Tensor,
        place: OperationPlace,
        heads: int,
    ) -> torch.Tensor:
        results, bias = split_projection(self._owner, plain, mixed, heads)
        version = None if results.is_inference() else results._version
        seen = current.touch(place, results)
        changed = version is None or seen is not results or results._version != version
        if not (changed or seen.requires_grad):
            return output
        total = seen.sum(-2) if bias is None else seen.sum(-2) + bias
        # With gradients they flow through the results; the numbers are the projection's own as long as nobody edits.
        return total if changed else output.detach() + (total - total.detach())


def _show_all(current: Pass, showings: list[Showing], tensor: Any) -> Any:
    rank = -1
    while True:  # a block that is served at one place may ask for the next
        following = next((showing for showing in showings if showing.rank > rank), None)
        if following is None:
            return tensor
        rank = following.rank
        tensor = show(current, following, tensor)


def open_port(overrides: dict[Any, Any], owner: Any) -> Port:
    """The port of a module in a run with these overrides, made at need."""
    found = overrides.get(owner)
    while found is not None and not isinstance(found, Port):
        found = getattr(found, "_previous", None)
    if found is None:
        found = overrides[owner] = Port(owner, overrides.get(owner))
    return found
