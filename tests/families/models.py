"""Small random models of the families that take token ids, by name."""

from __future__ import annotations

from torch.nn import Module
from zoo import FAMILIES, VOCABULARY
from zoo import build as build_family

__all__ = ["BUILDERS", "FAMILIES", "VOCABULARY", "blocks", "build"]

BUILDERS = {name: family.make for name, family in FAMILIES.items() if family.takes_text}


def build(family: str) -> Module:
    """The model of a family, the same each time, in eval mode."""
    return build_family(FAMILIES[family])


def blocks(family: str, model: Module) -> str:
    """The path of the list of blocks."""
    return FAMILIES[family].blocks
