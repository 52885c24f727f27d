"""A trace made far down the stack takes nothing from the ones after it."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from nnsight import NNsight


class Deep(nn.Module):
    """Recurses in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Identity()

    def forward(self, x: Tensor, depth: int) -> Tensor:
        return self.leaf(x) if depth == 0 else self.forward(x, depth - 1)


def traced(depth: int) -> Tensor:
    model = NNsight(Deep())
    with model.trace(torch.ones(2), depth=depth):
        return model.leaf.output.save()


def far_down(levels: int) -> Tensor:
    return traced(1) if levels == 0 else far_down(levels - 1)


def test_room_for_recursion_comes_back() -> None:
    room = sys.getrecursionlimit() // 8
    assert torch.equal(traced(room), torch.ones(2))
    far_down(sys.getrecursionlimit() // 2)
    assert torch.equal(traced(room), torch.ones(2))


def test_room_does_not_shrink_from_trace_to_trace() -> None:
    """A trial run inside a deferred block starts its coroutine from within another one."""
    room = sys.getrecursionlimit() // 8
    for _ in range(60):
        model = NNsight(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        with model.trace() as tracer:
            with tracer.invoke(torch.ones(1, 2)):
                model[0].output
            with tracer.invoke(torch.zeros(2, 2)):
                model[1].output
    assert torch.equal(traced(room), torch.ones(2))
