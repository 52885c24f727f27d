"""Every invoke of a batch is the same input traced alone: at every module, under edits, and for gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import Family, build, inputs, prompts
from zoo.capability import shows
from zoo.plain import Event, copies_of, hooks, on_output, record
from zoo.traced import close, envoy, first_calls, own_part, read, shown, wrap

from nnsight import NNsight
from nnsight.errors import RowsError

LENGTHS = (1, 40, 7, 13, 2, 26)
IMAGES = 3


def alone(family: Family, net: Any) -> list[dict[str, torch.Tensor]]:
    """The inputs of the batch, each as the plain model takes it by itself."""
    if not family.takes_text:
        return [inputs(family, rows=1, seed=seed) for seed in range(IMAGES)]
    ids = [torch.tensor([prompt]) for prompt in prompts(LENGTHS)]
    singles = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    if family.kind == "encoder-decoder":
        start = torch.full((1, 1), net.config.decoder_start_token_id)
        singles = [{**single, "decoder_input_ids": start} for single in singles]
    return singles


def invoke(family: Family, tracer: Any, single: dict[str, torch.Tensor]) -> Any:
    """The invoke of one of them; text is given as token ids, and the model pads it."""
    return tracer.invoke(single["input_ids"][0].tolist()) if family.takes_text else tracer.invoke(**single)


def read_all(model: NNsight, events: list[Event], refused: set[str]) -> list[Any]:
    """The value at each place in the order of the forward, None where the rows cannot be told apart."""
    seen = []
    for event in events:
        try:
            seen.append(shown(read(model, event.path, event.kind), event.native))
        except RowsError:
            seen.append(None)
            refused.add(f"{event.path}.{event.kind}")
    return seen


@shows("batched")
@torch.no_grad()
def test_every_value_is_the_single_runs(family: Family, record_property: Any) -> None:
    net = build(family)
    singles = alone(family, net)
    expected = [first_calls(record(net, lambda: net(**single))) for single in singles]  # noqa: B023
    model = wrap(family, net)
    seen: dict[int, list[Any]] = {}
    refused: set[str] = set()
    with model.trace() as tracer:
        for i, single in enumerate(singles):
            with invoke(family, tracer, single):
                seen[i] = read_all(model, expected[i], refused)
    compared = 0
    for i, events in enumerate(expected):
        for event, leaves in zip(events, seen[i], strict=True):
            compared += leaves is not None and assert_same(family, leaves, event)
    assert {place for place in refused if not family.may_refuse(place)} == set()
    record_property("places", compared)
    record_property("refused", sorted(refused))


def assert_same(family: Family, leaves: dict[str, torch.Tensor], event: Event) -> bool:
    """A mask may be there in a batch only; every other tensor is the same in both."""
    for at in leaves.keys() ^ event.leaves.keys():
        assert event.kind == "input", (event.path, at)
        assert leaves.get(at, torch.zeros(0)).dim() in (2, 4) or "position" in at, (event.path, at)
    for at in leaves.keys() & event.leaves.keys():
        ours, theirs = leaves[at], event.leaves[at]
        assert close(own_part(ours, theirs, left=family.pads_left), theirs), f"{event.path}.{event.kind}{at}"
    return bool(leaves)


@shows("batched")
@torch.no_grad()
def test_edits_stay_in_their_rows(family: Family) -> None:
    net = build(family)
    singles = alone(family, net)
    model = wrap(family, net)
    places = [f"{family.blocks}.0", family.attention, f"{family.blocks}.1"]
    edited, plain = {}, {}
    with model.trace() as tracer:
        for i, single in enumerate(singles):
            with invoke(family, tracer, single):
                if i % 2:
                    edit(model, places[i // 2 % 3], in_place=i % 4 == 1)
                edited[i] = copies_of(envoy(model, family.head).output)
    with model.trace() as tracer:
        for i, single in enumerate(singles):
            with invoke(family, tracer, single):
                plain[i] = copies_of(envoy(model, family.head).output)
    for i, single in enumerate(singles):
        if i % 2 == 0:
            assert all(torch.allclose(leaf, plain[i][at], rtol=0, atol=1e-6) for at, leaf in edited[i].items())
        with hooks(*([on_output(net.get_submodule(places[i // 2 % 3]), lambda h: h * 1.5 - 0.1)] if i % 2 else [])):
            events = first_calls(record(net, lambda: net(**single)))  # noqa: B023
        expected = next(event for event in events if event.path == family.head and event.kind == "output")
        assert assert_same(family, edited[i], expected)


def edit(model: NNsight, path: str, *, in_place: bool) -> None:
    place = envoy(model, path)
    value = place.output
    hidden = value[0] if isinstance(value, tuple) else value
    if in_place:
        hidden *= 1.5
        hidden -= 0.1
    elif isinstance(value, tuple):
        place.output[0] = hidden * 1.5 - 0.1
    else:
        place.output = hidden * 1.5 - 0.1


@shows("batched")
def test_gradients_stay_in_their_rows(family: Family) -> None:
    net = build(family)
    singles = alone(family, net)[:3]
    model = wrap(family, net)
    gradients: dict[int, torch.Tensor] = {}
    with model.trace() as tracer:
        for i, single in enumerate(singles):
            with invoke(family, tracer, single):
                hidden = first_tensor(envoy(model, f"{family.blocks}.0").output)
                loss = own_loss(family, first_tensor(envoy(model, family.head).output), single)
                with loss.backward(retain_graph=True):
                    gradients[i] = hidden.grad.clone()
    for i, single in enumerate(singles):
        kept: dict[str, torch.Tensor] = {}
        with hooks(
            net.get_submodule(f"{family.blocks}.0").register_forward_hook(
                lambda _m, _a, out: kept.__setitem__("hidden", first_tensor(out))  # noqa: B023
            ),
            net.get_submodule(family.head).register_forward_hook(
                lambda _m, _a, out: kept.__setitem__("head", out)  # noqa: B023
            ),
        ):
            net(**single)
        (expected,) = torch.autograd.grad(own_loss(family, kept["head"], single), kept["hidden"])
        assert bool(expected.any())
        assert close(own_part(gradients[i], expected, left=family.pads_left), expected)


def first_tensor(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def own_loss(family: Family, head: torch.Tensor, single: dict[str, torch.Tensor]) -> torch.Tensor:
    """A number made of the own part of an output."""
    if family.kind in ("decoder", "encoder", "vision-language"):
        length = single["input_ids"].shape[1]
        head = head[:, -length:] if family.pads_left else head[:, :length]
    return (head * torch.linspace(-1, 1, head.shape[-1])).sum()


@pytest.mark.parametrize("name", ["llama"])
def test_shared_tables_are_not_cut(name: str) -> None:
    from zoo import FAMILIES

    model = wrap(FAMILIES[name], build(FAMILIES[name]))
    tables = {}
    with model.trace() as tracer:
        for i, prompt in enumerate(([5, 6], [7, 8])):
            with tracer.invoke(prompt):
                tables[i] = model.model.rotary_emb.output[0]
    with model.trace([5, 6]):
        single = model.model.rotary_emb.output[0]
    assert torch.equal(tables[0][:1], single[:1])
    assert torch.equal(tables[1][:1], single[:1])
