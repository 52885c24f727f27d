"""A cache of everything: what hooks see, of every call of every module."""

from __future__ import annotations

from typing import Any

import torch
from zoo import Family, build, inputs, prompts
from zoo.capability import shows
from zoo.plain import record
from zoo.traced import close, given, own_part, shown, wrap

from nnsight.errors import RowsError


@shows("cache")
@torch.no_grad()
def test_every_call_of_every_module(family: Family) -> None:
    net, fed = build(family), inputs(family)
    events = {(f"model.{e.path}".rstrip("."), e.kind, e.call): e for e in record(net, lambda: net(**fed))}
    args, kwargs = given(family, fed)
    with wrap(family, net).trace(*args, **kwargs) as tracer:
        cache = tracer.cache(include_inputs=True, copy=True)
    found = {(path, kind, i) for path in cache for i, _ in enumerate(cache[path].calls) for kind in ("input", "output")}
    assert found == events.keys()
    for (path, kind, i), event in events.items():
        call = cache[path].calls[i]
        leaves = shown(call.output if kind == "output" else call.inputs, event.native)
        for at, leaf in event.leaves.items():
            assert ".layers." in at or torch.equal(leaves[at], leaf), (
                f"{path}.{kind} of call {i}"
            )  # no copies of caches


@shows("cache", only=lambda family: family.takes_text)
@torch.no_grad()
def test_of_an_invoke(family: Family) -> None:
    """Each invoke's cache holds its own rows, or says that they cannot be told apart."""
    net = build(family)
    some = prompts((5, 11))
    model = wrap(family, net)
    caches: dict[int, Any] = {}
    with model.trace() as tracer:
        for i, prompt in enumerate(some):
            with tracer.invoke(prompt):
                caches[i] = tracer.cache(copy=True)
    for i, prompt in enumerate(some):
        with model.trace(prompt) as tracer:
            alone = tracer.cache(copy=True)
        assert list(caches[i]) == list(alone)
        for path in alone:
            for ours, single in zip(caches[i][path].calls, alone[path].calls, strict=True):
                try:
                    leaves = shown(ours.output, object)
                except RowsError:
                    assert family.may_refuse(f"{path.removeprefix('model.')}.output")
                    continue
                for at, leaf in shown(single.output, object).items():
                    part = own_part(leaves[at], leaf, left=family.pads_left)
                    assert close(part, leaf), f"{path}{at}"
