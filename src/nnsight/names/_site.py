"""Site: one value of the vocabulary as an object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..envoy import Envoy
from ..errors import NamesError
from ._access import Access
from ._terms import AXES, BEFORE, BEHIND, LAYER

if TYPE_CHECKING:
    from ._stack import Stack
    from ._vocabulary import Vocabulary

_RANKS = {name: rank for rank, name in enumerate(LAYER)}


@dataclass(frozen=True)
class Site:
    """A value of the vocabulary: `model.site("head_z", 3)` is what `model.heads[3].z` reads and writes.

    Sites are equal where they name the same value, and sort in the order in which a model computes them.

    Args:
        name: The name of the value.
        layer: The layer, None where the model has the value once.
        stack: `"encoder"` or `"decoder"` where there are two, else empty.
    """

    name: str
    layer: int | None
    stack: str = ""
    _access: Access = field(repr=False, compare=False, kw_only=True)
    _rank: int = field(repr=False, compare=False, kw_only=True, default=0)

    @property
    def axes(self) -> tuple[str, ...]:
        """What the dimensions of the value are: `("batch", "pos", "d_model")`."""
        return AXES[self.name]

    @property
    def path(self) -> str:
        """Where the value is found: `model.transformer.h.3.attn.c_proj.input`."""
        return self._access.where(self.layer or 0)

    @property
    def order(self) -> tuple[int, int, int]:
        """A key that sorts sites as the model computes them: stack, layer, place in the layer."""
        if self.layer is not None:
            return (self._rank, self.layer, _RANKS[self.name])
        return (self._rank, -1 if self.name in BEFORE else len(self._access.stack), 0 if self.name != "logits" else 1)

    @property
    def module(self) -> Envoy:
        """The envoy of the module that the value belongs to."""
        return self._access.stack.envoy_of(self._access.module(self.layer or 0))

    def read(self) -> torch.Tensor:
        """The value, in a trace."""
        return self._access.stack.read(self._access, self.layer or 0)

    def write(self, value: Any) -> None:
        """Put a value in its place, in a trace; a tensor is broadcast as in `x[:] = value`."""
        self._access.stack.write(self._access, self.layer or 0, value)

    def __lt__(self, other: Site) -> bool:
        return self.order < other.order

    def __repr__(self) -> str:
        layer = "" if self.layer is None else f", {self.layer}"
        return f"Site({self.name!r}{layer}{f', stack={self.stack!r}' if self.stack else ''})"


def find_site(names: Vocabulary, name: str, layer: int | None, stack: str | None) -> Site:
    """The site of a name; `NamesError` where the model has no such value."""
    name = {"q": "head_q", "k": "head_k", "v": "head_v"}.get(name, name)
    if name in ("pattern", "z", "result"):
        name = f"head_{name}"
    if name not in AXES:
        raise names.unknown(name)
    found = names.stack_for(name, stack)
    number = _number(found, name, layer)
    rank = list(names.stacks.values()).index(found)
    return Site(name, number, found.name, _access=found.access(name), _rank=rank)


def _number(stack: Stack, name: str, layer: int | None) -> int | None:
    if name in BEFORE or name in BEHIND:
        if layer is not None:
            raise NamesError(f"The model has {name} once, not at a layer: site({name!r}).")
        return None
    if layer is None:
        raise NamesError(f"{name} is a value of each layer: site({name!r}, 0) to site({name!r}, {len(stack) - 1}).")
    number = stack.number(layer)
    stack.access(name).module(number)
    return number
