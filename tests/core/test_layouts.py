"""Which part of a value is whose: layouts that only the data, or the whole batch, explain must never be guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nnsight import NNsight
from nnsight.errors import EditError, NeverRanError, OutOfOrderError, OutOfOrderWarning, RowsError

WIDTH = 4


class Experts(nn.Module):
    """Each token goes to the expert that a router chooses: experts are modules, called with their tokens only."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, number)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(number)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        chosen = self.router(tokens).argmax(-1)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            places = (chosen == i).nonzero()[:, 0]
            if len(places):
                out[places] = expert(tokens[places])
        return out.reshape(x.shape)


class Sorted(nn.Module):
    """The same with the tokens of all experts in one tensor, sorted by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.activate = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        order = self.router(tokens).argmax(-1).sort(stable=True).indices
        out = torch.zeros_like(tokens)
        out[order] = self.activate(tokens[order])
        return out.reshape(x.shape)


class Centred(nn.Module):
    """A tensor without a batch dimension that is made of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Identity()
        self.table = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.mean(x.mean(0)) + self.table(torch.arange(WIDTH) * 0.1)


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.flat = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.layer(x.transpose(0, 1))  # [seq, batch, d]
        return self.flat(rows.reshape(-1, WIDTH)).reshape(rows.shape).transpose(0, 1)  # tokens in column-major order


class Cache:
    """What a model keeps between layers, in an object of its own."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []
        self.name = "a cache"
        self.owner = self


def filled(value: torch.Tensor) -> Cache:
    cache = Cache()
    cache.kept.append(value)
    return cache


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), Keeper()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache = Cache()
        cache.kept.append(self.first(x))
        return self.second(x, cache=cache) + cache.kept[0]


class Keeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        return self.layer(x) * cache.kept[0]


def model_of(kind: Any, seed: int = 0) -> NNsight:
    torch.manual_seed(seed)
    return NNsight(kind())


def inputs_of(seed: int, rows: int = 2, length: int = 6) -> list[torch.Tensor]:
    torch.manual_seed(1000 + seed)
    return [torch.randn(1, length, WIDTH) for _ in range(rows)]


def seen_in_invokes(model: NNsight, inputs: list[torch.Tensor], path: str) -> list[torch.Tensor] | None:
    """What each invoke sees at a module; None where one is refused."""
    found: dict[int, torch.Tensor] = {}
    try:
        with torch.no_grad(), model.trace() as tracer:
            for i, x in enumerate(inputs):
                with tracer.invoke(x):
                    found[i] = model.get(path).output.clone()
    except RowsError:
        return None
    return list(found.values())


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("kind", [lambda: Experts(2), lambda: Experts(4), Sorted], ids=["two", "four", "sorted"])
def test_tokens_of_others_are_never_shown(kind: Any, length: int) -> None:
    """Over many inputs, also those that fall evenly on the experts: refused, or what the single run shows."""
    refused = 0
    for seed in range(15):
        model = model_of(kind, seed)
        path = "activate" if hasattr(model._model, "activate") else "experts.0"
        for inputs in (inputs_of(seed, length=length), inputs_of(seed + 500, rows=4, length=length)):
            try:
                found = seen_in_invokes(model, inputs, path)
            except NeverRanError:
                continue  # nobody's tokens go to this expert
            refused += found is None
            for value, x in zip(found or (), inputs, strict=bool(found)):
                tokens = model._model.get_submodule(path)(x.reshape(-1, WIDTH))
                assert all(bool((row - tokens).abs().amax(-1).min() < 1e-5) for row in value)
    assert refused > 5


def test_column_major_tokens_are_refused() -> None:
    model = model_of(TimeFirst)
    inputs = inputs_of(0)
    assert seen_in_invokes(model, inputs, "flat") is None
    found = seen_in_invokes(model, inputs, "layer")
    assert found is not None
    for value, x in zip(found, inputs, strict=True):
        assert torch.allclose(value, model._model.layer(x).transpose(0, 1), atol=1e-6)


def test_what_is_made_of_all_rows_is_refused() -> None:
    model = model_of(Centred)
    inputs = inputs_of(0)
    assert seen_in_invokes(model, inputs, "mean") is None
    tables = seen_in_invokes(model, inputs, "table")
    assert tables is not None
    assert all(torch.equal(table, torch.arange(WIDTH) * 0.1) for table in tables)


class TestObjects:
    def test_hold_own_rows_only(self) -> None:
        model, inputs = model_of(Keeping), inputs_of(0)
        seen: dict[int, Cache] = {}
        with torch.no_grad(), model.trace() as tracer:
            for i, x in enumerate(inputs):
                with tracer.invoke(x):
                    seen[i] = model.second.inputs[1]["cache"]
        for i, x in enumerate(inputs):
            assert torch.equal(seen[i].kept[0], model._model.first(x))
            assert (seen[i].name, type(seen[i])) == ("a cache", Cache)

    @pytest.mark.parametrize("manner", ["in place", "item", "attribute", "assigned"])
    def test_edits_reach_the_model(self, manner: str) -> None:
        model, inputs = model_of(Keeping), inputs_of(0)
        found: dict[int, torch.Tensor] = {}
        with torch.no_grad(), model.trace() as tracer:
            for i, x in enumerate(inputs):
                with tracer.invoke(x):
                    if i == 1:
                        change(model.second, manner)
                    found[i] = model.output.clone()
        with torch.no_grad():
            assert torch.equal(found[0], model._model(inputs[0]))
            with model.trace(inputs[1]):
                model.first.output[:] *= 2
                expected = model.output.clone()
            assert torch.equal(found[1], expected)

    @pytest.mark.parametrize("manner", ["in place", "item", "attribute"])
    def test_changes_inside_are_not_repeated_by_a_second_pass(self, manner: str) -> None:
        model, (x, _) = model_of(Keeping), inputs_of(0)
        with torch.no_grad(), pytest.raises(OutOfOrderError, match="inside an object"), model.trace(x):
            change(model.second, manner)
            model.output
            model.second.output

    def test_unchanged_are_no_obstacle_to_a_second_pass(self) -> None:
        model, (x, _) = model_of(Keeping), inputs_of(0)
        with torch.no_grad(), pytest.warns(OutOfOrderWarning), model.trace(x):
            assert model.second.inputs[1]["cache"].kept
            model.output
            late = model.second.output
        assert torch.equal(late, model._model.second(x, filled(model._model.first(x))))

    def test_of_another_form_are_refused(self) -> None:
        model, inputs = model_of(Keeping), inputs_of(0)
        with pytest.raises(EditError, match="holds 2 tensors"), model.trace() as tracer:
            with tracer.invoke(inputs[0]):
                model.second.inputs = (inputs[0],), {"cache": Cache()}
            with tracer.invoke(inputs[1]):
                pass


def change(place: Any, manner: str) -> None:
    args, kwargs = place.inputs
    cache = kwargs["cache"]
    if manner == "in place":
        cache.kept[0][:] *= 2
    elif manner == "item":
        cache.kept[0] = cache.kept[0] * 2
    elif manner == "attribute":
        cache.kept = [cache.kept[0] * 2]
    else:
        other = Cache()
        other.kept.append(cache.kept[0] * 2)
        place.inputs = args, {"cache": other}


class Masked(nn.Module):
    """Makes a mask of one row for all, or of a row for each, as the input needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.mask, self.layer = nn.Identity(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        odd = (x < -50).any(-1, keepdim=True)
        mask = self.mask(odd if bool(odd.any()) else odd[:1])
        return self.layer(x).masked_fill(mask, 0)


def test_a_tensor_that_is_shared_in_one_run_and_not_in_another() -> None:
    model, plain = model_of(Masked), inputs_of(0)
    marked = [x.clone() for x in plain]
    for i, x in enumerate(marked):
        x[0, i] = -100
    for _ in range(2):
        shared, own = seen_in_invokes(model, plain, "mask"), seen_in_invokes(model, marked, "mask")
        assert shared is not None
        assert own is not None
        assert all(mask.shape == (1, 6, 1) and not mask.any() for mask in shared)
        assert [mask.flatten().nonzero().flatten().tolist() for mask in own] == [[0], [1]]
