"""Skipped blocks: the hidden states stand for what a block returns, whatever else it returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import Family, build, inputs
from zoo.capability import shows
from zoo.plain import hooks
from zoo.traced import envoy, given, wrap

from nnsight.errors import EditError

NOT_ALONE = ("t5",)  # what later blocks use of its output is more than the hidden states


def first_of(args: Any, kwargs: Any) -> torch.Tensor:
    return args[0] if args else next(iter(kwargs.values()))


@shows("edit")
@torch.no_grad()
def test_a_block_is_skipped(family: Family) -> None:
    net, path, fed = build(family), f"{family.blocks}.1", inputs(family)
    args, kwargs = given(family, fed)

    def pass_by(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = first_of(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with hooks(net.get_submodule(path).register_forward_hook(pass_by, with_kwargs=True)):
        expected = net(**fed)[0]
    model = wrap(family, net)
    block = envoy(model, path)
    if family.name in NOT_ALONE:
        with pytest.raises(EditError, match=r"skip it with the whole"):
            with model.trace(*args, **kwargs):
                block.skip(block.input)
    with model.trace(*args, **kwargs) as tracer:
        rest = tuple(envoy(model, f"{family.blocks}.0").output)[1:] if family.name in NOT_ALONE else ()
        block.skip((block.input, *rest) if rest else block.input)
        found = tracer.result[0]
    assert torch.equal(found, expected)
    assert not torch.equal(found, net(**fed)[0])
