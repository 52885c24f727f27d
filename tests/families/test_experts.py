"""Mixtures of experts: an invoke never sees another's tokens, in routers and experts either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import FAMILIES, Family, build, prompts
from zoo.plain import Leaves, copies_of, leaves_of, record
from zoo.traced import close, envoy, first_calls, own_part, read, wrap

from nnsight.errors import RowsError

LENGTHS = (9, 23, 1, 14)
MIXTURES = [family for family in FAMILIES.values() if family.routers]
EXPERTS = pytest.mark.parametrize("family", MIXTURES, ids=lambda family: family.name)


def plain_values(family: Family, net: Any, prompt: list[int]) -> dict[tuple[str, str], Leaves]:
    events = first_calls(record(net, lambda: net(input_ids=torch.tensor([prompt]))))
    return {(event.path, event.kind): event.leaves for event in events if event.path in family.routers}


@EXPERTS
@torch.no_grad()
def test_values_are_those_of_the_single_run(family: Family) -> None:
    net = build(family)
    model = wrap(family, net)
    expected = [plain_values(family, net, prompt) for prompt in prompts(LENGTHS)]
    seen: list[dict[tuple[str, str], Leaves]] = [{} for _ in LENGTHS]
    with model.trace() as tracer:
        for found, places, prompt in zip(seen, expected, prompts(LENGTHS), strict=True):
            with tracer.invoke(prompt):
                for path, kind in places:
                    found[path, kind] = copies_of(read(model, path, kind))
    for found, places, length in zip(seen, expected, LENGTHS, strict=True):
        assert len(places) == 2 * len(family.routers)
        for place, leaves in places.items():
            assert found[place].keys() == leaves.keys() != set()
            for at, leaf in leaves.items():
                own = own_part(found[place][at], leaf, left=True)
                assert close(own, leaf), f"{place}{at}"
                assert leaf.shape[0] in (length, 1) or leaf.shape[1] == length


def test_no_mixture_is_left_out() -> None:
    assert {family.name for family in MIXTURES} >= {
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "gpt_oss",
        "deepseek_v3",
        "jamba",
    }


@EXPERTS
@pytest.mark.parametrize("kind", ["input", "output"])
@torch.no_grad()
def test_edits_leave_the_others_as_they_are(family: Family, kind: str) -> None:
    """The second of three prompts is edited at each router and each experts' module; the others must not notice."""
    net = build(family)
    model = wrap(family, net)
    some = prompts((9, 23, 14))
    for path in family.routers:
        edited, plain = logits(model, some, path, kind, 1), logits(model, some, path, kind, None)
        for i in (0, 2):
            assert torch.allclose(edited[i], plain[i], rtol=0, atol=1e-6)
        assert not close(edited[1], plain[1], 1e-4), path
        alone = logits(model, some[1:2], path, kind, 0)[0]
        assert close(own_part(edited[1], alone, left=True), alone)


def logits(model: Any, some: list[list[int]], path: str, kind: str, which: int | None) -> dict[int, torch.Tensor]:
    """The logits of each prompt, with all floating-point numbers of one of them changed at a place."""
    found: dict[int, torch.Tensor] = {}
    with model.trace() as tracer:
        for i, prompt in enumerate(some):
            with tracer.invoke(prompt):
                if i == which:
                    scale(read(model, path, kind))
                found[i] = model.output.logits.clone()
    return found


def scale(value: Any) -> None:
    for leaf in leaves_of(value).values():
        if leaf.is_floating_point():
            leaf *= torch.linspace(0.5, 1.5, leaf.shape[-1])


@pytest.mark.parametrize("family", [f for f in MIXTURES if f.refuses], ids=lambda family: family.name)
@torch.no_grad()
def test_tokens_sorted_by_expert_are_refused(family: Family) -> None:
    model = wrap(family, build(family))
    path = next(path for path in family.routers if path.endswith("experts"))
    with pytest.raises(RowsError, match="act_fn"), model.trace() as tracer:
        for prompt in prompts((9, 9)):
            with tracer.invoke(prompt):
                envoy(model, f"{path}.act_fn").output
