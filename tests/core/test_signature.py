"""Models that look at their own forward find it as it is."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from nnsight import NNsight


class Chooser(nn.Module):
    """Passes an argument only to a child that takes it, as `generate` of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Doubler()

    def forward(self, x: Tensor) -> Tensor:
        takes = "factor" in inspect.signature(self.child.forward).parameters
        return self.child(x, factor=3.0) if takes else self.child(x)


class Doubler(nn.Module):
    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor


def test_the_signature_of_forward_is_the_modules_own() -> None:
    net = Chooser()
    model = NNsight(net)
    x = torch.ones(2, 3)
    seen: list[Any] = []
    with model.trace(x):
        child = model.child.output
        seen.append(inspect.signature(net.child.forward))
    assert torch.equal(child, x * 3)
    assert seen == [inspect.signature(Doubler().forward)]


def test_the_signature_of_an_instances_own_forward() -> None:
    net = Chooser()

    def own(x: Tensor, factor: float = 5.0, *, more: bool = False) -> Tensor:
        return x * factor

    net.child.forward = own
    model = NNsight(net)
    seen: list[Any] = []
    with model.trace(torch.ones(2, 3)):
        assert torch.equal(model.child.output, torch.ones(2, 3) * 3)
        seen.append(inspect.signature(net.child.forward))
    assert seen == [inspect.signature(own)]
