"""Shapes and dtypes of a model without weights: those of the real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import FAMILIES, Family, build, inputs
from zoo.capability import shows
from zoo.plain import leaves_of, record
from zoo.traced import first_calls, given, read, wrap

from nnsight import LanguageModel

Shapes = dict[str, tuple[torch.Size, torch.dtype]]


def shapes_of(leaves: dict[str, torch.Tensor]) -> Shapes:
    return {at: (leaf.shape, leaf.dtype) for at, leaf in leaves.items()}


def real_shapes(family: Family) -> list[tuple[str, str, type, Shapes]]:
    net, fed = build(family), inputs(family)
    with torch.no_grad():
        events = first_calls(record(net, lambda: net(**fed)))
    return [(event.path, event.kind, event.native, shapes_of(event.leaves)) for event in events]


def scanned(model: Any, family: Family, places: list[tuple[str, str, type, Shapes]]) -> list[Shapes]:
    args, kwargs = given(family, inputs(family))
    seen = []
    with torch.no_grad(), model.scan(*args, **kwargs):
        for path, kind, native, _ in places:
            value = read(model, path, kind)
            is_block_output = isinstance(value, torch.Tensor) and issubclass(native, tuple)
            seen.append(shapes_of(leaves_of(tuple(value) if is_block_output else value)))
    return seen


def without_masks(shapes: Shapes, known: Shapes) -> Shapes:
    """Whether a mask is needed at all depends on its numbers: a scan has one in any case."""
    return {at: shape for at, shape in shapes.items() if at in known or not ("mask" in at or shape[1] == torch.bool)}


@shows("scan")
def test_a_model_without_weights(family: Family) -> None:
    places = [place for place in real_shapes(family) if not family.may_differ(f"{place[0]}.{place[1]}")]
    with torch.device("meta"):
        net = family.make().eval()
    model = wrap(family, net)
    for (path, kind, _, expected), shapes in zip(places, scanned(model, family, places), strict=True):
        assert without_masks(shapes, expected) == expected, f"{path}.{kind}"
    assert all(parameter.is_meta for parameter in net.parameters())


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mamba", "mixtral"])
def test_a_model_that_is_not_loaded(name: str, tmp_path: Any) -> None:
    family = FAMILIES[name]
    build(family).save_pretrained(tmp_path)
    places = [place for place in real_shapes(family) if not family.may_differ(f"{place[0]}.{place[1]}")]
    model = LanguageModel(str(tmp_path), tokenizer=object())
    for (path, kind, _, expected), shapes in zip(places, scanned(model, family, places), strict=True):
        assert without_masks(shapes, expected) == expected, f"{path}.{kind}"
    assert not model.dispatched
