"""Hot, warm and cold: never more than the budget in memory, every model has its turn, what is used last stays longest."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnsight.server._budget import Budget, BudgetError, Standing, plan
from nnsight.server._fleet import Fleet


class World:
    """Models whose jobs come at random; loading and unloading take time, as they do."""

    def __init__(self, sizes, budget, seed):
        self.budget, self.rng, self.now = budget, random.Random(seed), 0.0
        self.sizes = sizes
        self.tier = dict.fromkeys(sizes, "cold")
        self.held, self.since, self.used = {}, dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 0.0)
        self.jobs = {model: [] for model in sizes}  # when those that wait came
        self.running = {}  # model -> when it ends
        self.longest = 0.0

    def standings(self):
        return [
            Standing(
                model,
                size,
                self.tier[model],
                model in self.held,
                self.now - self.jobs[model][0] if self.jobs[model] else None,
                int(model in self.running),
                self.now - max(self.used[model], self.since[model] if self.tier[model] == "hot" else 0.0),
                self.now - self.since[model],
            )
            for model, size in self.sizes.items()
        ]

    def step(self, arrivals):
        self.now += 0.5
        for model in arrivals:
            self.jobs[model].append(self.now)
        for model, end in list(self.running.items()):
            if end <= self.now:
                del self.running[model]
                self.used[model] = self.now
        for model in list(self.held):
            if self.tier[model] != "hot" and model not in self.running:
                del self.held[model]  # it has rested
        for model, tier in plan(self.standings(), self.budget):
            assert (self.tier[model], tier) in {("cold", "hot"), ("warm", "hot"), ("hot", "warm"), ("warm", "cold")}
            assert tier != "cold" or model not in self.held
            self.tier[model], self.since[model] = tier, self.now
            if tier == "hot":
                self.held.setdefault(model, self.now + self.rng.uniform(0, 3))
        assert sum(self.sizes[model] for model in self.held) <= self.budget.memory
        assert (
            sum(tier == "warm" and model not in self.held for model, tier in self.tier.items()) <= self.budget.warm + 1
        )
        for model, loaded in self.held.items():
            ready = self.tier[model] == "hot" and loaded <= self.now and model not in self.running
            if ready and self.jobs[model]:
                self.longest = max(self.longest, self.now - self.jobs[model].pop(0))
                self.running[model] = self.now + self.rng.uniform(0, 4)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 10), min_size=2, max_size=6),
    st.integers(10, 20),
    st.integers(0, 2),
    st.integers(0, 2**32),
)
def test_memory_is_kept_to_and_every_job_runs(sizes, memory, warm, seed):
    world = World({f"m{number}": size for number, size in enumerate(sizes)}, Budget(memory, warm, turn=10), seed)
    rng = random.Random(seed + 1)
    for _ in range(300):
        world.step([model for model in world.sizes if rng.random() < 0.05])
    for _ in range(4000):
        world.step([])
        if not any(world.jobs.values()):
            break
    assert not any(world.jobs.values())


def test_a_flood_on_one_model_leaves_the_others_their_turn():
    world = World({"flood": 10, "rare": 10}, Budget(10, turn=10), 0)
    for number in range(400):
        world.step(["flood"] + (["rare"] if number == 50 else []))
    assert not world.jobs["rare"]
    assert world.tier["flood"] == "hot"


def test_who_was_used_last_stays_longest():
    models = [
        Standing("old", 5, "hot", True, idle=50, hot=60),
        Standing("new", 5, "hot", True, idle=1, hot=60),
        Standing("wanted", 5, "cold", False, waited=0.1),
    ]
    assert plan(models, Budget(10)) == [("old", "warm")]


def test_what_is_used_keeps_its_place_for_a_turn():
    busy = Standing("busy", 5, "hot", True, waited=1, running=1, hot=3)
    wanted = Standing("wanted", 5, "cold", False, waited=30)
    assert plan([busy, wanted], Budget(5, turn=10)) == []
    assert plan([busy._replace(hot=11), wanted], Budget(5, turn=10)) == [("busy", "warm")]
    assert plan([busy._replace(hot=11), wanted._replace(waited=5)], Budget(5, turn=10)) == []


def test_where_there_is_no_place_the_warm_ones_give_up_theirs():
    models = [
        Standing("placeless", 5, "hot", True, cramped=True, waited=1),
        Standing("first", 5, "warm", False, idle=5),
        Standing("second", 5, "warm", False, idle=9),
    ]
    assert plan(models, Budget(10, warm=5)) == [("second", "cold")]


def test_a_model_that_never_fits_is_refused_by_name():
    fleet = Fleet(["small"], lambda _: [], None, budget=Budget(100), size_of=lambda model: len(model) * 10)
    with pytest.raises(BudgetError, match=r"'much too large' has .* MiB of weights"):
        fleet.deploy("much too large")
    assert fleet.names() == ["small"]
    with pytest.raises(BudgetError, match="memory budget"):
        Fleet(["much too large"], lambda _: [], None, budget=Budget(100), size_of=lambda model: len(model) * 10)
