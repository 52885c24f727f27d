"""Which models are loaded, where memory is not enough for all of them: hot, warm and cold.

Hot is loaded, and takes jobs.  Warm has its processes, without weights: it is loaded again sooner.  Cold has nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..errors import NNsightError

Tier = Literal["hot", "warm", "cold"]
TURN = 10.0  # seconds that a model keeps its place though others wait for it


class BudgetError(NNsightError):
    """A model that has no room within the memory budget."""


class Budget(NamedTuple):
    """What all models together may take.

    Attributes:
        memory: Bytes of weights.
        warm: How many models are kept warm.
        turn: Seconds that a model that is used keeps its place though others wait for it.
    """

    memory: int
    warm: int = 1
    turn: float = TURN


class Standing(NamedTuple):
    """How a model stands.

    Attributes:
        model: Its name.
        size: Bytes of its weights in all replicas.
        tier: What it is to be.
        held: Whether its weights, or some of them, are in memory.
        waited: Seconds that the oldest of its jobs has waited; None where none waits.
        running: Its jobs that run.
        idle: Seconds since it was used last.
        hot: Seconds since it became hot.
        cramped: Whether there is no place for its processes.
    """

    model: str
    size: int
    tier: Tier
    held: bool
    waited: float | None = None
    running: int = 0
    idle: float = 0.0
    hot: float = 0.0
    cramped: bool = False


def plan(models: Sequence[Standing], budget: Budget) -> list[tuple[str, Tier]]:
    """The changes to make now; what else they need is planned when those are done."""
    tiers: dict[str, Tier] = {each.model: each.tier for each in models}
    held = sum(each.size for each in models if each.held)
    leaving = sum(each.size for each in models if each.held and each.tier != "hot")
    for each in sorted(models, key=lambda each: -(each.waited or 0.0)):
        if each.waited is None or each.tier == "hot":
            continue
        if held + each.size <= budget.memory:
            tiers[each.model] = "hot"
            held += 0 if each.held else each.size
        elif held - leaving + each.size > budget.memory:
            lacking = held - leaving + each.size - budget.memory
            for victim in _victims(models, each, lacking, budget):
                tiers[victim.model] = "warm"
                leaving += victim.size
        break  # who waits longest goes first, and nobody takes the room that is being made for it
    if any(each.cramped and tiers[each.model] == "hot" for each in models):
        _make_place(models, tiers)
    rested = [each for each in models if tiers[each.model] == "warm" and each.tier == "warm" and not each.held]
    for each in sorted(rested, key=lambda each: each.idle)[budget.warm :]:
        tiers[each.model] = "cold"
    return [(each.model, tiers[each.model]) for each in models if tiers[each.model] != each.tier]


def _victims(models: Sequence[Standing], waiting: Standing, lacking: int, budget: Budget) -> list[Standing]:
    """Whom to unload: those that nobody uses, and where that is not enough, those that have had their turn."""
    loaded = [each for each in models if each.tier == "hot" and each.model != waiting.model]
    unused = [each for each in loaded if each.waited is None and not each.running]
    used = [each for each in loaded if each not in unused and each.hot >= budget.turn]
    if (waiting.waited or 0.0) < budget.turn:
        used = []
    found: list[Standing] = []
    for each in [*sorted(unused, key=lambda each: -each.idle), *sorted(used, key=lambda each: -each.hot)]:
        if lacking <= 0:
            break
        found.append(each)
        lacking -= each.size
    return found if lacking <= 0 else []


def _make_place(models: Sequence[Standing], tiers: dict[str, Tier]) -> None:
    """A hot model's processes have no place: the warm model used least recently gives up its own, or an unused hot one."""
    warm = [each for each in models if each.tier == "warm" and tiers[each.model] == "warm" and not each.held]
    unused = [
        each
        for each in models
        if tiers[each.model] == "hot" and each.waited is None and not each.running and not each.cramped
    ]
    if warm:
        tiers[max(warm, key=lambda each: each.idle).model] = "cold"
    elif unused:
        tiers[max(unused, key=lambda each: each.idle).model] = "warm"
