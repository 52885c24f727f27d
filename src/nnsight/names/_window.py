"""Window: what happens inside an attention's forward, shown to a run: rotated queries and keys, and the pattern.

The attention's forward is run from its source, with a few of its operations in view.  Where the pattern is asked for,
the layer computes its attention eagerly, by the model's own function for that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import Module

from .._core import Pass, Run, current_pass
from ..errors import NamesError, SourceError
from ..source import Interception, analyse, intercept
from ._eager import attend_eagerly, eager_mask
from ._ports import Showing, show

INTERFACE = "attention_interface_0"
_DROPOUT = "nn_functional_dropout_0"

Function = Callable[..., Any]


class Window:
    """The operations of one attention that one run shows; made by `open_window`."""

    def __init__(self, interception: Interception) -> None:
        self._interception = interception
        self._shown: dict[tuple[str, str], dict[int, Showing]] = {}
        self._patterns: dict[str, list[Any]] = {}
        self._eager: Interception | None = None

    def show(self, operation: str, kind: str, item: int, showing: Showing) -> None:
        """Show item `item` of what an operation is given, or gives."""
        self._shown.setdefault((operation, kind), {})[item] = showing
        self._watch(operation)

    def show_pattern(self, operation: str, place: Any) -> None:
        """Let the probabilities of the attention function that `operation` calls appear at `place`."""
        places = self._patterns.setdefault(operation, [])
        if place not in places:
            places.append(place)
            self._watch(operation)

    def prepare(self, operation: str) -> None:
        """See the operation from the attention's next call on, since something of it may be asked for later."""
        self._watch(operation)

    def _watch(self, operation: str) -> None:
        found = self._interception
        if operation not in found.redirects:
            found.redirects[operation] = partial(self._redirect, operation)
            if found.only is not None:
                found.only |= {operation}

    def _redirect(
        self, operation: str, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Function, tuple[Any, ...], dict[str, Any]]:
        return partial(self._call, operation, function), args, kwargs

    def _call(self, operation: str, function: Function, *args: Any, **kwargs: Any) -> Any:
        current = current_pass()
        if current is None:
            return function(*args, **kwargs)
        args = self._touch(current, (operation, "input"), args)
        if operation in self._patterns:
            function, args, kwargs = self._eagerly(operation, function, args, kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, tuple):
            return self._touch(current, (operation, "output"), result)
        return self._touch(current, (operation, "output"), (result,))[0]

    def _touch(self, current: Pass, key: tuple[str, str], items: tuple[Any, ...]) -> tuple[Any, ...]:
        at = 0 if key in self._shown else len(items)
        while at < len(items):  # a block that is served at one item may ask for the next
            showing = self._shown.get(key, {}).get(at)
            if showing is not None:
                items = (*items[:at], show(current, showing, items[at]), *items[at + 1 :])
            at += 1
        return items

    # --- patterns --------------------------------------------------------------------------------------------

    def _eagerly(
        self, operation: str, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Function, tuple[Any, ...], dict[str, Any]]:
        if operation != INTERFACE:
            return partial(attend_eagerly, partial(self._show, operation)), args, kwargs
        eager = eager_function(self._interception.owner)
        if eager is not function:
            attention, query, key, value, *rest = args
            mask = rest[0] if rest else kwargs.get("attention_mask")
            mask = eager_mask(attention, query, key, mask, kwargs)
            kwargs = {name: option for name, option in kwargs.items() if name != "attention_mask"}
            args = (attention, query, key, value, mask, *rest[1:])
        if self._eager is None:
            self._eager = Interception(None)
            self._eager.only = frozenset({_DROPOUT})
            self._eager.redirects[_DROPOUT] = self._redirect_dropout
        return self._eager(eager), args, kwargs

    def _redirect_dropout(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Function, tuple[Any, ...], dict[str, Any]]:
        return partial(self._drop, function), args, kwargs

    def _drop(self, function: Function, weights: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._show(INTERFACE, weights, function, *args, **kwargs)

    def _show(
        self, operation: str, weights: torch.Tensor, function: Function, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Apply `function`, a dropout, to the weights as the blocks leave them."""
        current = current_pass()
        if current is None:
            return function(weights, *args, **kwargs)
        if weights.requires_grad:
            weights = weights.clone()  # the softmax needs its own result for its gradient
        for place in self._patterns[operation]:
            if isinstance(place, Module):  # a dropout that the forward itself does not call any more
                function = partial(_call_at, place, function)
            else:
                weights = current.touch(place, weights)
        return function(weights, *args, **kwargs)


def _call_at(place: Module, function: Function, *args: Any, **kwargs: Any) -> Any:
    current = current_pass()
    return function(*args, **kwargs) if current is None else current.call(place, function, args, kwargs)


def open_window(run: Run, attention: Module) -> Window:
    """The window on `attention` in this run; what it shows is visible from the next call of the attention on."""
    interception = intercept(run.overrides, attention)
    if interception.guest is None:
        if interception.place_of is None:
            interception.only = interception.only or frozenset()
        interception.guest = Window(interception)
    return interception.guest


def eager_function(attention: Module) -> Function:
    """The function by which a model computes `attention` with its probabilities."""
    forward = inspect.unwrap(type(attention).forward)
    found = getattr(forward, "__globals__", {}).get("eager_attention_forward")
    if found is None:
        raise NamesError(f"{type(attention).__name__} has no eager attention function, so it shows no pattern.")
    return found


def calls_interface(attention: Module) -> bool:
    """Whether an attention is computed by a function that its config chooses."""
    try:
        return INTERFACE in analyse(type(attention).forward).operations
    except SourceError:
        return False
