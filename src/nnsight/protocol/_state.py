"""What of an object with attributes travels with a job, and what of it comes back only."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.nn import Module

from ..errors import TravelError

# Of a module: what is called when it is saved or loaded, and has no part in what it computes.
_STAYS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def state_of(value: Any) -> dict[str, Any]:
    """The attributes of an object; of a module what `pickle` would ask it for, without hooks on its state.

    Raises:
        TravelError: The class has a `__getstate__` that gives something else.
    """
    if not isinstance(value, Module):
        return dict(vars(value))
    own = getattr(type(value), "__getstate__", None)
    state = vars(value) if own is None or own is getattr(object, "__getstate__", None) else own(value)
    if not isinstance(state, dict):
        raise TravelError(f"A {type(value).__qualname__} cannot travel: its __getstate__ does not give a dict.")
    return {name: part for name, part in state.items() if name not in _STAYS}


def results_of(value: Any) -> dict[str, Any]:
    """The values of a dataclass's fields that are marked with `metadata={"travels": "back"}`."""
    if not dataclasses.is_dataclass(value):
        return {}
    fields = [field.name for field in dataclasses.fields(value) if field.metadata.get("travels") == "back"]
    return {name: getattr(value, name, None) for name in fields}
