"""Gradients in a trace: plain autograd's, at several places and of all parameters."""

from __future__ import annotations

from typing import Any

import torch
from zoo import Family, build, inputs
from zoo.capability import shows
from zoo.plain import hooks
from zoo.traced import close, envoy, given, wrap


def places_of(family: Family) -> list[str]:
    """In the order of the forward."""
    return [f"{family.blocks}.0", family.attention, f"{family.blocks}.1", family.head]


def first_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value[0]


def loss_of(head: torch.Tensor) -> torch.Tensor:
    return (head.log_softmax(-1) * torch.linspace(-1, 1, head.shape[-1])).sum()


def by_autograd(family: Family, net: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    values: list[torch.Tensor] = []
    keep = [
        net.get_submodule(path).register_forward_hook(lambda _m, _a, output: values.append(first_tensor(output)))
        for path in places_of(family)
    ]
    with hooks(*keep):
        net(**inputs(family))
    for value in values:
        value.retain_grad()
    loss_of(values[-1]).backward()
    gradients = [value.grad.clone() for value in values if value.grad is not None]
    of_parameters = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return gradients, of_parameters


@shows("gradients")
def test_at_several_places(family: Family) -> None:
    net = build(family)
    expected, _ = by_autograd(family, net)
    model = wrap(family, net)
    args, kwargs = given(family, inputs(family))
    with model.trace(*args, **kwargs):
        values = [first_tensor(envoy(model, path).output) for path in places_of(family)]
        with loss_of(values[-1]).backward():
            found = [value.grad.clone() for value in reversed(values)]
    for ours, theirs in zip(reversed(found), expected, strict=True):
        assert bool(theirs.any())
        assert close(ours, theirs, 1e-6)


@shows("gradients")
def test_of_the_parameters(family: Family) -> None:
    net = build(family)
    _, expected = by_autograd(family, net)
    model = wrap(family, net)
    args, kwargs = given(family, inputs(family))
    with model.trace(*args, **kwargs):
        envoy(model, f"{family.blocks}.0").output
        loss_of(first_tensor(envoy(model, family.head).output)).backward()
    found = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    assert len(found) > 10
    assert all(close(found[name], expected[name], 1e-6) for name in found)


@shows("gradients")
def test_changing_one(family: Family) -> None:
    net = build(family)
    earlier, later = f"{family.blocks}.0", f"{family.blocks}.1"
    values: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            values[path] = first_tensor(output)
            if path == later:
                values[path].register_hook(lambda gradient: gradient * 2)

        return net.get_submodule(path).register_forward_hook(hook)

    with hooks(keep(earlier), keep(later), keep(family.head)):
        net(**inputs(family))
    (expected,) = torch.autograd.grad(loss_of(values[family.head]), values[earlier])
    model = wrap(family, net)
    args, kwargs = given(family, inputs(family))
    with model.trace(*args, **kwargs):
        first = first_tensor(envoy(model, earlier).output)
        second = first_tensor(envoy(model, later).output)
        with loss_of(first_tensor(envoy(model, family.head).output)).backward():
            second.grad = second.grad * 2
            found = first.grad.clone()
    assert close(found, expected, 1e-6)
