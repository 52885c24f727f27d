"""Lasting edits: they stay over traces and generations, and the model itself is as it was."""

from __future__ import annotations

from typing import Any

import torch
from zoo import Family, build, inputs, prompts
from zoo.capability import shows
from zoo.plain import copies_of, hooks, leaves_of, on_output
from zoo.traced import envoy, given, wrap


def scaled(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * 1.3 - 0.2


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(leaf, other[at]) for at, leaf in one.items())


@shows("edit_model")
@torch.no_grad()
def test_over_traces(family: Family) -> None:
    net, path = build(family), f"{family.blocks}.1"
    model = wrap(family, net)
    with model.edit() as edited:
        envoy(model, path).output[0][:] = envoy(model, path).output[0] * 1.3 - 0.2
    for seed in (0, 1):
        fed = inputs(family, seed=seed)
        args, kwargs = given(family, fed)
        plain = copies_of(net(**fed))
        with hooks(on_output(net.get_submodule(path), scaled)):
            expected = copies_of(net(**fed))
        with edited.trace(*args, **kwargs) as tracer:
            changed = tracer.result
        with model.trace(*args, **kwargs) as tracer:
            unchanged = tracer.result
        assert equal(leaves_of(changed), expected)
        assert equal(leaves_of(unchanged), plain)
        assert not equal(expected, plain)


@shows("edit_model", only=lambda family: family.generates)
@torch.no_grad()
def test_over_a_generation(family: Family) -> None:
    net = build(family)
    model = wrap(family, net)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    fed = feed(family)
    for path in dict.fromkeys((f"{family.blocks}.1", f"{family.steps}.1")):
        with hooks(on_output(net.get_submodule(path), scaled)):
            expected = net.generate(**fed, **options)  # pyright: ignore[reportCallIssue]
        with model.edit() as edited:
            envoy(model, path).output[0][:] = envoy(model, path).output[0] * 1.3 - 0.2
        with edited.generate(**fed, **options):  # pyright: ignore[reportAttributeAccessIssue]
            found = edited.generator.output  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(found, expected)


def feed(family: Family) -> dict[str, Any]:
    if family.takes_text:
        ids = torch.tensor(prompts((6,)))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: value for name, value in inputs(family, rows=1).items() if name != "decoder_input_ids"}
