"""A cache as plain parts, for sending it to another process, and the cache made of such parts."""

from __future__ import annotations

from typing import Any

from ..envoy import Aliases
from ._cache import Cache, Names
from ._recording import Site

_OUTPUT, _INPUTS = "output", "inputs"


def cache_parts(cache: Cache) -> dict[str, Any]:
    """The names of the model's modules, the steps of each call, and each call's values by themselves."""
    names, parts = cache._names, dict[str, Any]()
    parts["paths"], parts["children"] = dict(names.first), {path: list(found) for path, found in names.children.items()}
    parts["aliases"] = None if names.aliases is None else list(names.aliases.parts())
    parts["steps"] = {path: list(site.steps) for path, site in cache._sites.items()}
    for path, site in cache._sites.items():
        outputs, inputs = site.kept()
        parts |= {f"{_OUTPUT} {number} {path}": value for number, value in enumerate(outputs)}
        parts |= {f"{_INPUTS} {number} {path}": value for number, value in enumerate(inputs)}
    return parts


def cache_of(parts: dict[str, Any]) -> Cache:
    """The cache that `cache_parts` took apart.

    Raises:
        ValueError: The parts do not fit together.
    """
    paths, children, aliases, steps = (parts.get(name) for name in ("paths", "children", "aliases", "steps"))
    if not (isinstance(paths, dict) and isinstance(children, dict) and isinstance(steps, dict)):
        raise ValueError("a cache without the names of its modules")
    if not set(paths.values()) <= children.keys() or not steps.keys() <= children.keys():
        raise ValueError("a cache of modules that are not among its names")
    names = Names.of(paths, {path: tuple(found) for path, found in children.items()}, aliases and Aliases.of(*aliases))
    return Cache(names, {path: _site(path, list(made), parts) for path, made in steps.items()})


def _site(path: str, steps: list[int], parts: dict[str, Any]) -> Site:
    if not all(type(step) is int for step in steps):
        raise ValueError("the steps of a cache are numbers")
    kept = (
        [parts[name] for number in range(len(steps)) if (name := f"{kind} {number} {path}") in parts]
        for kind in (_OUTPUT, _INPUTS)
    )
    return Site.of(path, steps, *kept)
