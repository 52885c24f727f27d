"""The operations of an attention's forward, or of what stands in its place: read, and changed."""

from __future__ import annotations

from typing import Any

import torch
from zoo import Family, build, inputs
from zoo.capability import shows
from zoo.plain import copies_of, hooks, leaves_of, on_output, record
from zoo.traced import envoy, given, wrap


def called_inside(family: Family, net: Any, fed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of the modules directly inside the attention, in the order of their calls."""
    with torch.no_grad():
        events = record(net, lambda: net(**fed))
    inside = f"{family.attention}."
    return {
        event.path.removeprefix(inside): event.leaves[""]
        for event in events
        if event.kind == "output" and event.path.startswith(inside) and "" in event.leaves and not event.call
    }


def operation_of(family: Family, source: Any, child: str) -> str:
    """The operation in a forward that calls a submodule, or nothing."""
    name = family.operations.get(child, f"self_{child.replace('.', '_')}_0")
    return name if name in source else ""


@shows("source")
@torch.no_grad()
def test_operations_that_call_modules(family: Family) -> None:
    net, fed = build(family), inputs(family)
    plain = copies_of(net(**fed))
    children = called_inside(family, net, fed)
    model = wrap(family, net)
    args, kwargs = given(family, fed)
    seen: dict[str, torch.Tensor] = {}
    with model.trace(*args, **kwargs) as tracer:
        source = envoy(model, family.attention).source
        for child in children:
            name = operation_of(family, source, child)
            if name:
                seen[child] = source[name].output.clone()
        result = leaves_of(tracer.result)
    assert seen
    assert all(torch.equal(value, children[child]) for child, value in seen.items())
    assert all(torch.equal(leaf, plain[at]) for at, leaf in result.items())


@shows("source")
@torch.no_grad()
def test_changing_one(family: Family) -> None:
    net, fed = build(family), inputs(family)
    plain = copies_of(net(**fed))
    model = wrap(family, net)
    args, kwargs = given(family, fed)
    source = envoy(model, family.attention).source
    child = next(child for child in called_inside(family, net, fed) if operation_of(family, source, child))
    module = net.get_submodule(f"{family.attention}.{child}")
    with hooks(on_output(module, lambda value: value * 0.5 + 0.2)):
        expected = copies_of(net(**fed))
    with model.trace(*args, **kwargs) as tracer:
        operation = envoy(model, family.attention).source[operation_of(family, source, child)]
        operation.output = operation.output * 0.5 + 0.2
        result = leaves_of(tracer.result)
    assert any(not torch.equal(leaf, plain[at]) for at, leaf in expected.items())
    assert all(torch.equal(leaf, expected[at]) for at, leaf in result.items())
