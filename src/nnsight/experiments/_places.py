"""Places: where in a model an experiment reads and writes, by standard name or by path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from nnsight import Envoy, NNsight, errors

_NAMED = re.compile(r"(?:(?P<stack>encoder|decoder)\.)?(?P<name>[a-z_]+)(?:\[(?P<layer>-?\d+)\])?$")
_STREAM = ("batch", "pos", "feature")


@dataclass(frozen=True)
class Place:
    """One value of a model.

    Attributes:
        key: How it is written: `"resid_pre[3]"`, or `"transformer.h.3.mlp.output"`.
        axes: What its dimensions are; those behind the batch and the position of a value found by path are unknown, and
            so are the first two until they have been checked.
        target: The site or the envoy that is read.
        kind: `"input"` or `"output"`, empty for a site.
    """

    key: str
    axes: tuple[str, ...]
    target: Any
    kind: str = ""

    def read(self) -> Any:
        """The value, in a trace; of a tuple, its first item."""
        if not self.kind:
            return self.target.read()
        value = getattr(self.target, self.kind)
        return value[0] if isinstance(value, (tuple, list)) else value

    def write(self, value: torch.Tensor) -> None:
        """Put `value` there, in a trace."""
        if not self.kind:
            self.target.write(value)
        elif isinstance(getattr(self.target, self.kind), (tuple, list)):
            getattr(self.target, self.kind)[0] = value
        else:
            setattr(self.target, self.kind, value)


def find_place(model: NNsight, place: Any) -> Place:
    """The place that a user names.

    Args:
        model: The model.
        place: A standard name (`"resid_pre[3]"`, `("resid_pre", 3)`, `model.site("resid_pre", 3)`), a module's path
            (`"transformer.h.3.mlp"`, its output; `"transformer.h.3.mlp.input"`), or an envoy.

    Raises:
        InputError: It is none of these.
        UnknownPathError: The model has no such module.
        NamesError: The model has no such named value.
    """
    if isinstance(place, Place):
        return place
    if isinstance(place, Envoy):
        return _at_path(model, place.path)
    if isinstance(place, str):
        found = _NAMED.match(place)
        if found and _is_named(model, found["name"]):
            layer = None if found["layer"] is None else int(found["layer"])
            return _at_site(model, found["name"], layer, found["stack"])
        return _at_path(model, place)
    if isinstance(place, (tuple, list)) and len(place) in (1, 2) and isinstance(place[0], str):
        return _at_site(model, *place)
    name, layer = getattr(place, "name", None), getattr(place, "layer", None)
    if isinstance(name, str):
        return _at_site(model, name, layer, getattr(place, "stack", "") or None)
    raise errors.InputError(
        f'A place is a name ("resid_pre[3]"), a path ("transformer.h.3.mlp"), a site or an envoy, not {place!r}.'
    )


def find_places(model: NNsight, places: Any) -> list[Place]:
    """All the places that a user names, one or several, each once."""
    several = isinstance(places, (list, set, frozenset)) or (
        isinstance(places, tuple) and not (len(places) == 2 and isinstance(places[1], int))
    )
    found = {place.key: place for place in (find_place(model, p) for p in (places if several else [places]))}
    if not found:
        raise errors.InputError("Name at least one place, such as sites=['resid_pre[3]'].")
    return list(found.values())


def _is_named(model: NNsight, name: str) -> bool:
    return name not in model._model._modules and hasattr(model, "site") and name != "model"


def _at_site(model: Any, name: str, layer: int | None = None, stack: str | None = None) -> Place:
    site = model.site(name, layer, stack=stack)
    key = site.name if site.layer is None else f"{site.name}[{site.layer}]"
    return Place(f"{site.stack}.{key}" if site.stack else key, site.axes, site)


def _at_path(model: NNsight, path: str) -> Place:
    path = path.removeprefix("model.") if "model" not in model._model._modules else path
    base, dot, kind = path.rpartition(".")
    kind = kind if kind in ("input", "output") and (dot or path in ("input", "output")) else ""
    envoy = model.get(base) if kind else model.get(path)
    return Place(f"{base}.{kind}".strip(".") if kind else f"{path}.output".strip("."), _STREAM, envoy, kind or "output")
