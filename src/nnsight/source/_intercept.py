"""Interceptions: what one run does with the operations of one function."""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

from torch.nn import Module

from nnsight._core import current_pass

from ._instrument import Dispatch, instrument
from ._layers import Function, same

Redirect = Callable[[Function, tuple[Any, ...], dict[str, Any]], tuple[Function, tuple[Any, ...], dict[str, Any]]]


class Interception:
    """What stands in a run's overrides for a module, and below it for the functions that its operations call.

    `redirects` gives what is called in place of an operation; `only` are the operations that a redirect may be given
    for, where that is known beforehand.  Once `place_of` is set, every operation is a place of the run, visible from the
    next call of `owner` on; `callees` then holds the functions that the operations call for which somebody waits.  A
    `previous` override of the module stays in force.
    """

    def __init__(self, owner: Any, previous: Callable[[Function], Function] | None = None) -> None:
        self.owner = owner
        self._previous = previous
        self.redirects: dict[str, Redirect] = {}
        self.only: frozenset[str] | None = None
        self.guest: Any = None  # whoever gave the redirects
        self.place_of: Callable[[str], Any] | None = None
        self.callees: dict[Any, Function] = {}
        self._inside: dict[str, Interception] = {}
        self._made: tuple[Function, Function, frozenset[str] | None] | None = None

    def inside(self, name: str) -> Interception:
        """The interception of the function that operation `name` calls, made at need."""
        return self._inside.setdefault(name, Interception(None))

    def __call__(self, plain: Function) -> Function:
        """The function to run instead of `plain`."""
        if isinstance(plain, Module):  # it has hooks, and operations of its own
            return plain
        current = current_pass()
        only = None if self.place_of is not None else self.only
        if self.owner is not None and current is not None and (self.place_of is not None or only):
            current.see().open(self.owner)
        if self._made is None or self._made[2] != only or not same(self._made[0], plain):
            function = plain if self._previous is None else self._previous(plain)
            self._made = plain, instrument(function, _dispatch_to(self), only=only), only
        return self._made[1]

    def _dispatch(self, name: str, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        current = current_pass()
        if self.place_of is None or current is None:
            return self._enter(name, function, *args, **kwargs)
        place = self.place_of(name)
        if place in current.wanted_inputs or place in current.wanted_outputs:
            self.callees[place] = function
        return current.call(place, partial(self._enter, name, function), args, kwargs)

    def _enter(self, _name: str, _function: Function, /, *args: Any, **kwargs: Any) -> Any:
        redirect, inside = self.redirects.get(_name), self._inside.get(_name)
        if redirect is not None:
            _function, args, kwargs = redirect(_function, args, kwargs)
        return (_function if inside is None else inside(_function))(*args, **kwargs)


def _dispatch_to(interception: Interception) -> Dispatch:
    # Weakly: what an interception made must not keep it, and the values it saw, alive.
    reference = weakref.ref(interception)

    def dispatch(name: str, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = reference()
        return function(*args, **kwargs) if found is None else found._dispatch(name, function, args, kwargs)

    return dispatch


def intercept(overrides: MutableMapping[Any, Any], module: Module) -> Interception:
    """The one interception of `module` in a run with these overrides, made at need."""
    found = overrides.get(module)
    if not isinstance(found, Interception):
        found = overrides[module] = Interception(module, found)
    return found
