"""Reading and changing one trace: what plain hooks see and do, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from zoo import Family, build, inputs
from zoo.capability import shows
from zoo.plain import copies_of, hooks, leaves_of, on_input, on_output, record
from zoo.traced import envoy, first_calls, given, read, shown, wrap

from nnsight import NNsight


@shows("trace")
@torch.no_grad()
def test_every_value_is_what_hooks_see(family: Family) -> None:
    net, fed = build(family), inputs(family)
    events = first_calls(record(net, lambda: net(**fed)))
    model = wrap(family, net)
    args, kwargs = given(family, fed)
    with model.trace(*args, **kwargs) as tracer:
        seen = [shown(read(model, event.path, event.kind), event.native) for event in events]
        result = leaves_of(tracer.result)
    for event, leaves in zip(events, seen, strict=True):
        assert_equal(leaves, event.leaves, f"{event.path}.{event.kind}")
    assert_equal(result, events[-1].leaves, "result")


@shows("trace")
def test_without_reads_nothing_changes(family: Family) -> None:
    net, fed = build(family), inputs(family)
    expected = copies_of(net(**fed))
    args, kwargs = given(family, fed)
    with wrap(family, net).trace(*args, **kwargs) as tracer:
        result = tracer.result
    assert type(net(**fed)) in type(result).__mro__
    assert_equal(leaves_of(result), expected, "result")


Edit = Callable[[torch.Tensor], torch.Tensor]


@shows("edit")
@pytest.mark.parametrize("manner", ["in place", "assigned"])
@torch.no_grad()
def test_edits_do_what_hooks_do(family: Family, manner: str) -> None:
    net, fed = build(family), inputs(family)
    model = wrap(family, net)
    args, kwargs = given(family, fed)
    plain = copies_of(net(**fed))
    places = [(f"{family.blocks}.0", "output"), (family.attention, "output"), (f"{family.blocks}.1", "output")]
    for path, kind in [*places, (family.head, "input")]:
        edit = in_place if manner == "in place" else assigned
        hook = on_output if kind == "output" else on_input
        with hooks(hook(net.get_submodule(path), edit)):
            expected = copies_of(net(**fed))
        with model.trace(*args, **kwargs) as tracer:
            change(model, path, kind, edit)
            result = tracer.result
        assert_equal(leaves_of(result), expected, f"after editing {path}.{kind}")
        assert any(not torch.equal(leaf, plain[at]) for at, leaf in expected.items() if plain[at].is_floating_point())


def in_place(value: torch.Tensor) -> None:
    value[:, -1:] *= 1.5
    value += 0.1


def assigned(value: torch.Tensor) -> torch.Tensor:
    return value * 0.5 - 0.1


def change(model: NNsight, path: str, kind: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    place = envoy(model, path)
    if kind == "input":
        changed = edit(place.input)
        if changed is not None:
            place.input = changed
        return
    value = place.output
    is_tuple = isinstance(value, tuple)
    changed = edit(value[0] if is_tuple else value)
    if changed is not None and is_tuple:
        place.output[0] = changed
    elif changed is not None:
        place.output = changed


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, Any], where: str) -> None:
    assert ours.keys() == theirs.keys(), where
    for at, leaf in ours.items():
        assert leaf.dtype == theirs[at].dtype
        assert torch.equal(leaf, theirs[at]), f"{where}{at}"
