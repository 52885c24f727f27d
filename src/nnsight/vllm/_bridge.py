"""Bridges: values of vLLM's modules as Hugging Face's have them.

vLLM has no batch dimension, splits the residual stream in two where norms are fused with the addition before them, and
lets linear layers return their bias.  A block sees the tokens of its request as `[1, pos, …]`, the stream whole, and
one tensor where one is meant.  What it changes is put back in vLLM's form.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import Module

from .._core import map_tensors
from ..errors import EditError

_MAIN = ("hidden_states", "x", "input_", "input", "input_ids")
_STREAM = "residual"


class Bridge:
    """How one class of modules is called and answers."""

    def __init__(self, kind: type[Module]) -> None:
        self._names = _names_of(kind)
        self._fused = _STREAM in self._names
        self._is_norm = "Norm" in kind.__name__

    # --- inputs ------------------------------------------------------------------------------------------------

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        """The arguments of a call."""
        named = dict(zip(self._names, args, strict=False))
        rest = args[len(named) :]
        named |= kwargs
        main = next((name for name in _MAIN if isinstance(named.get(name), torch.Tensor)), None)
        if main is None:
            main = next((name for name, value in named.items() if isinstance(value, torch.Tensor)), None)
        return Inputs(named, rest, len(args), main, named.get(_STREAM) if self._fused else None, self._is_norm)

    # --- outputs -----------------------------------------------------------------------------------------------

    def output(self, result: Any) -> Output:
        """What a call returned."""
        return Output(result, self._fused and not self._is_norm)


class Inputs:
    """The arguments of one call, of all requests; `main` is the one that a block calls `.input`."""

    def __init__(
        self,
        named: dict[str, Any],
        rest: tuple[Any, ...],
        positional: int,
        main: str | None,
        stream: Any,
        keeps_stream: bool,
    ) -> None:
        self._named = named
        self._rest = rest
        self._positional = positional - len(rest)
        self._main = main
        self._stream = stream if isinstance(stream, torch.Tensor) else None
        self._copied = False
        self.joins_stream = keeps_stream and self._stream is not None  # what goes in goes on beside the norm too

    @property
    def value(self) -> torch.Tensor | None:
        """What a block sees, of all requests."""
        return None if self._main is None else self._named[self._main]

    @property
    def tokens(self) -> int:
        """How many tokens the model is called for."""
        return self._named["positions"].shape[-1]

    def rows(self, start: int, stop: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a block sees: `((value,), {})`."""
        if self._main is None:
            return (), {}
        value = self._named[self._main][start:stop]
        if self._stream is not None:
            value = value + self._stream[start:stop]
        return (own(value),), {}

    def put(self, start: int, stop: int, inputs: tuple[tuple[Any, ...], dict[str, Any]], path: str) -> None:
        """Exchange one request's rows."""
        named, main = self._named, self._main
        value = check_only_input(inputs if main is not None else ((), {}), path)
        assert main is not None
        if not self._copied:
            self._copied = True
            named[main] = named[main].clone()
            if self._stream is not None:
                self._stream = named[_STREAM] = self._stream.clone()
        fill(named[main][start:stop], value, path)
        if self._stream is not None:
            self._stream[start:stop] = 0

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All rows, and where the residual stream is in two parts, the other one."""
        assert self._main is not None
        return self._named[self._main], self._stream

    def exchange(self, main: torch.Tensor, stream: torch.Tensor | None) -> None:
        """Put other tensors in place of those of `parts`."""
        assert self._main is not None
        self._named[self._main] = main
        if stream is not None:
            self._stream = self._named[_STREAM] = stream

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the module takes them."""
        names = list(self._named)
        args = tuple(self._named[name] for name in names[: self._positional])
        return (*args, *self._rest), {name: self._named[name] for name in names[self._positional :]}


class Output:
    """The result of one call, of all requests."""

    def __init__(self, result: Any, summed: bool) -> None:
        self._items = list(result) if isinstance(result, tuple) else [result]
        self._native = isinstance(result, tuple)
        held = self._items[0] if self._items else None
        self._first = held if isinstance(held, torch.Tensor) else None
        second = self._items[1] if len(self._items) > 1 else None
        self._stream = second if summed and isinstance(second, torch.Tensor) else None
        self._copied = False

    @property
    def value(self) -> torch.Tensor | None:
        """What a block sees, of all requests."""
        return self._first

    def rows(self, start: int, stop: int) -> Any:
        """What a block sees: the request's rows `[1, pos, …]` of the first tensor."""
        if self._first is None:
            return self.result
        value = self._first[start:stop]
        return own(value if self._stream is None else value + self._stream[start:stop])

    def put(self, start: int, stop: int, value: Any, path: str) -> None:
        """Exchange one request's rows."""
        if self._first is None:
            raise EditError(f"{path}.output is no tensor, and can be read only.")
        if not self._copied:
            self._copied = True
            self._first = self._items[0] = self._first.clone()
            if self._stream is not None:
                self._stream = self._items[1] = self._stream.clone()
        fill(self._first[start:stop], value, path)
        if self._stream is not None:
            self._stream[start:stop] = 0

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All rows, and where the residual stream is in two parts, the other one."""
        assert self._first is not None
        return self._first, self._stream

    def exchange(self, main: torch.Tensor, stream: torch.Tensor | None) -> None:
        """Put other tensors in place of those of `parts`."""
        self._first = self._items[0] = main
        if stream is not None:
            self._stream = self._items[1] = stream

    @property
    def result(self) -> Any:
        """The result as the module returns it."""
        return tuple(self._items) if self._native else self._items[0]


def _names_of(kind: type[Module]) -> list[str]:
    """The names of a forward's arguments; where it takes any, it is one of several, which take the same."""
    forwards = (kind.forward, getattr(kind, "forward_native", None))
    for forward in filter(None, forwards):
        parameters = list(inspect.signature(forward).parameters.values())
        if all(one.kind is not one.VAR_POSITIONAL for one in parameters):
            names = [one.name for one in parameters]
            return names[1:] if names[:1] == ["self"] else names
    return []


@functools.cache
def bridge_of(kind: type[Module]) -> Bridge:
    """The bridge for a class of modules."""
    return Bridge(kind)


def own(rows: torch.Tensor) -> torch.Tensor:
    """Rows as a tensor that nobody else has, with a batch dimension: what the engine does next leaves it alone."""
    with torch.inference_mode(False), torch.no_grad():
        return rows.unsqueeze(0).clone()


def fill(rows: torch.Tensor, value: Any, path: str) -> None:
    """Put what a block made in place of rows of the engine's."""
    rows.copy_(check_fits((1, *rows.shape), value, path).detach().squeeze(0))


def check_fits(shape: Sequence[int], value: Any, path: str) -> torch.Tensor:
    """What a block made, where a tensor of this shape is due."""
    if not isinstance(value, torch.Tensor):
        raise EditError(f"{path} takes a tensor here, not a {type(value).__name__}.")
    if tuple(value.shape) != tuple(shape):
        raise EditError(f"{path} has the shape {list(shape)} here, and was assigned one of {list(value.shape)}.")
    return value


def check_only_input(inputs: tuple[tuple[Any, ...], Mapping[str, Any]], path: str) -> Any:
    """The one argument that a block sees of a call."""
    args, kwargs = inputs
    if len(args) + len(kwargs) != 1:
        raise EditError(f"{path}.inputs has one value here, ((hidden,), {{}}): assign {path}.input.")
    return args[0] if args else next(iter(kwargs.values()))


def versions_of(value: Any) -> list[tuple[torch.Tensor, int]]:
    """The tensors in a value, as they are now."""
    found: list[tuple[torch.Tensor, int]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append((tensor, tensor._version))
        return tensor

    map_tensors(note, value)
    return found
