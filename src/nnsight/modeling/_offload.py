"""Models whose weights are kept elsewhere between calls (accelerate): in a scan nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import Module

from .._core import Override


def without_offload(root: Module) -> dict[Module, Override]:
    """For each module that fetches its weights when it is called, the forward that does not."""
    found = {module: vars(module).get("_old_forward") for module in root.modules() if "_hf_hook" in vars(module)}
    return {module: _instead(forward) for module, forward in found.items() if forward is not None}


def _instead(forward: Callable[..., Any]) -> Override:
    return lambda _: forward
