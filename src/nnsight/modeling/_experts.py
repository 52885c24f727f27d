"""Mixtures of experts in a scan: the shapes must not depend on which expert a token goes to.

transformers has several ways to run a layer's experts; the one that gathers each token's weights has the same
shapes whatever the router says, and a scan has no numbers that it could change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.nn import Module

from .._core import Override


def gathered_experts(root: Module) -> dict[Module, Override]:
    """For each module that runs experts, the forward that gathers their weights."""
    try:
        from transformers.integrations.moe import batched_mm_experts_forward
    except ImportError:
        return {}
    found = [module for module in root.modules() if _runs_experts(module)]
    return {module: _instead(batched_mm_experts_forward, module) for module in found}


def _runs_experts(module: Module) -> bool:
    return hasattr(type(module), "_apply_gate") and hasattr(getattr(module, "config", None), "_experts_implementation")


def _instead(forward: Callable[..., Any], module: Module) -> Override:
    return lambda _: functools.partial(forward, module)
