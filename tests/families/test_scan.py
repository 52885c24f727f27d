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


def padded(family: Family) -> dict[str, torch.Tensor]:
    """Inputs with a padded row: whether a mask is needed at all depends on its values, which a scan has not."""
    fed = inputs(family)
    mask = fed.get("attention_mask", torch.ones(1, 1))
    mask[0, :3] = 0 if family.kind == "decoder" else mask[0, :3]
    mask[0, -3:] = 0 if family.kind.startswith("encoder") else mask[0, -3:]
    return fed


Shapes = dict[str, tuple[torch.Size, torch.dtype]]


def shapes_of(leaves: dict[str, torch.Tensor]) -> Shapes:
    return {at: (leaf.shape, leaf.dtype) for at, leaf in leaves.items()}


def real_shapes(family: Family) -> list[tuple[str, str, type, Shapes]]:
    net, fed = build(family), padded(family)
    with torch.no_grad():
        events = first_calls(record(net, lambda: net(**fed)))
    return [(event.path, event.kind, event.native, shapes_of(event.leaves)) for event in events]


def scanned(model: Any, family: Family, places: list[tuple[str, str, type, Shapes]]) -> list[Shapes]:
    args, kwargs = given(family, padded(family))
    seen = []
    with torch.no_grad(), model.scan(*args, **kwargs):
        for path, kind, native, _ in places:
            value = read(model, path, kind)
            is_block_output = isinstance(value, torch.Tensor) and issubclass(native, tuple)
            seen.append(shapes_of(leaves_of(tuple(value) if is_block_output else value)))
    return seen


@shows("scan")
def test_a_model_without_weights(family: Family) -> None:
    places = [place for place in real_shapes(family) if not family.may_differ(f"{place[0]}.{place[1]}")]
    with torch.device("meta"):
        net = family.make().eval()
    model = wrap(family, net)
    for (path, kind, _, expected), shapes in zip(places, scanned(model, family, places), strict=True):
        assert shapes == expected, f"{path}.{kind}"
    assert all(parameter.is_meta for parameter in net.parameters())


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mamba", "mixtral"])
def test_a_model_that_is_not_loaded(name: str, tmp_path: Any) -> None:
    family = FAMILIES[name]
    build(family).save_pretrained(tmp_path)
    places = [place for place in real_shapes(family) if not family.may_differ(f"{place[0]}.{place[1]}")]
    model = LanguageModel(str(tmp_path), tokenizer=object())
    for (path, kind, _, expected), shapes in zip(places, scanned(model, family, places), strict=True):
        assert shapes == expected, f"{path}.{kind}"
    assert not model.dispatched
