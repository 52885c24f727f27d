"""Pipelines of diffusers: what is shown of the other families, of every denoising step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from zoo import PIPELINES, Family
from zoo.capability import shows
from zoo.plain import copies_of, hooks, leaves_of, on_output, record
from zoo.traced import close, envoy, first_calls, read, shown

from nnsight import DiffusionModel, NNsight
from nnsight.errors import RowsError

STEPS = 3
PROMPTS = (("5 6 7", 1), ("8", 2), ("9 10 11 12 13", 3))
ONE_STEP = {"num_inference_steps": 1, "output_type": "pt"}
SEVERAL = {"num_inference_steps": STEPS, "output_type": "pt"}


def plain(pipeline: Any, prompt: str, seed: int, **options: Any) -> torch.Tensor:
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **options).images


def recorded(model: DiffusionModel, prompt: str, seed: int, **options: Any) -> list[Any]:
    return record(model._module, lambda: plain(model.pipeline, prompt, seed, **options))


def scaled(value: torch.Tensor) -> torch.Tensor:
    return value * 0.7 - 0.1


def places(family: Family) -> list[str]:
    return ["text_encoder.encoder.layers.0", f"{family.blocks}.0", family.attention, f"{family.blocks}.1"]


@shows("trace", of=PIPELINES)
def test_every_value_is_what_hooks_see(family: Family) -> None:
    model = DiffusionModel(family.make())
    events = first_calls(recorded(model, "5 6 7", 1, **ONE_STEP))
    with model.trace("5 6 7", seed=1, output_type="pt") as tracer:
        seen = [shown(read(model, event.path, event.kind), event.native) for event in events]
        images = tracer.result.images
    assert len(events) > 200
    for event, leaves in zip(events, seen, strict=True):
        assert leaves.keys() == event.leaves.keys()
        assert all(torch.equal(leaf, leaves[at]) for at, leaf in event.leaves.items()), f"{event.path}.{event.kind}"
    assert torch.equal(images, plain(model.pipeline, "5 6 7", 1, **ONE_STEP))


@shows("edit", of=PIPELINES)
@pytest.mark.parametrize("manner", ["in place", "assigned"])
def test_edits_do_what_hooks_do(family: Family, manner: str) -> None:
    model = DiffusionModel(family.make())
    unedited = plain(model.pipeline, "5 6 7", 1, guidance_scale=1, **ONE_STEP)
    for path in places(family):
        with hooks(on_output(model._module.get_submodule(path), scaled)):
            expected = plain(model.pipeline, "5 6 7", 1, guidance_scale=1, **ONE_STEP)
        with model.trace("5 6 7", seed=1, output_type="pt", guidance_scale=1) as tracer:
            place = envoy(model, path)
            if manner == "assigned":
                place.output = scaled(place.output)
            else:
                place.output[:] = scaled(place.output)
            images = tracer.result.images
        assert torch.equal(images, expected), path
        assert not torch.equal(images, unedited), path


@shows("batched", of=PIPELINES)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_every_value_is_the_single_runs(family: Family, guidance: float, record_property: Any) -> None:
    """Under guidance the denoiser gets `[uncond; cond]`: an invoke sees its rows of both halves."""
    model = DiffusionModel(family.make())
    singles = [
        first_calls(recorded(model, prompt, seed, guidance_scale=guidance, **ONE_STEP)) for prompt, seed in PROMPTS
    ]
    seen: dict[int, list[Any]] = {}
    refused: set[str] = set()
    with model.trace(output_type="pt", guidance_scale=guidance) as tracer:
        for i, (prompt, seed) in enumerate(PROMPTS):
            with tracer.invoke(prompt, seed=seed):
                seen[i] = read_all(model, singles[i], refused)
    for i, events in enumerate(singles):
        for event, leaves in zip(events, seen[i], strict=True):
            tolerance = (
                1e-4 if event.path.startswith("vae") else 1e-5
            )  # guidance multiplies the difference of two halves
            for at, leaf in event.leaves.items() if leaves is not None else ():
                assert close(leaves[at], leaf, tolerance), f"{event.path}.{event.kind}{at}"
    assert {place for place in refused if not family.may_refuse(place)} == set()
    record_property("refused", sorted(refused))


def read_all(model: NNsight, events: list[Any], refused: set[str]) -> list[Any]:
    seen = []
    for event in events:
        try:
            seen.append(shown(read(model, event.path, event.kind), event.native))
        except RowsError:
            seen.append(None)
            refused.add(f"{event.path}.{event.kind}")
    return seen


@shows("generate", of=PIPELINES)
def test_every_step(family: Family) -> None:
    model = DiffusionModel(family.make())
    module = model._module.get_submodule(f"{family.blocks}.1")
    kept: list[torch.Tensor] = []
    with hooks(
        on_output(module, scaled),
        model._module.get_submodule(family.head).register_forward_hook(lambda _m, _a, output: kept.append(output)),
    ):
        expected = plain(model.pipeline, "5 6 7", 1, **SEVERAL)
    found = []
    with model.generate("5 6 7", seed=1, **SEVERAL) as tracer:
        for _ in tracer.iter[:]:
            block = envoy(model, f"{family.blocks}.1")
            block.output = scaled(block.output)
            found.append(envoy(model, family.head).output.clone())
        images = tracer.result.images
    assert len(found) == len(kept) == STEPS
    assert all(torch.equal(one, other) for one, other in zip(found, kept, strict=True))
    assert torch.equal(images, expected)


@shows("scan", of=PIPELINES)
def test_shapes(family: Family) -> None:
    model = DiffusionModel(family.make())
    events = [
        event
        for event in first_calls(recorded(model, "5 6 7", 1, num_inference_steps=1, output_type="latent"))
        if event.path.startswith("unet")
    ]
    with model.scan("5 6 7", seed=1):
        seen = [leaves_of(read(model, event.path, event.kind)) for event in events]
        seen = [{at: (leaf.shape, leaf.dtype) for at, leaf in leaves.items()} for leaves in seen]
    for event, shapes in zip(events, seen, strict=True):
        assert shapes == {at: (leaf.shape, leaf.dtype) for at, leaf in event.leaves.items()}, event.path


@shows("gradients", of=PIPELINES)
def test_of_the_denoiser(family: Family) -> None:
    """A pipeline computes without gradients, so its denoiser is traced by itself."""
    unet = family.make().unet
    torch.manual_seed(3)
    fed = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 32),
    }
    kept: list[torch.Tensor] = []
    with hooks(unet.mid_block.register_forward_hook(lambda _m, _a, output: kept.append(output))):
        loss = unet(**fed).sample.pow(2).sum()
    (expected,) = torch.autograd.grad(loss, kept[0], retain_graph=True)
    loss.backward()
    of_parameters = {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}
    unet.zero_grad()
    model = NNsight(unet)
    with model.trace(**fed):
        hidden = model.mid_block.output
        with model.output.sample.pow(2).sum().backward():
            found = hidden.grad.clone()
    assert close(found, expected, 1e-6)
    unet.zero_grad()
    with model.trace(**fed):
        model.mid_block.output
        model.output.sample.pow(2).sum().backward()
    assert all(close(parameter.grad, of_parameters[name], 1e-6) for name, parameter in unet.named_parameters())


@shows("edit_model", of=PIPELINES)
def test_lasting_edits(family: Family) -> None:
    model = DiffusionModel(family.make())
    path = f"{family.blocks}.1"
    with hooks(on_output(model._module.get_submodule(path), scaled)):
        expected = plain(model.pipeline, "5 6 7", 1, **SEVERAL)
    with model.edit() as edited:
        envoy(model, path).output = scaled(envoy(model, path).output)
    for traced, images in ((edited, expected), (model, plain(model.pipeline, "5 6 7", 1, **SEVERAL))):
        with traced.generate("5 6 7", seed=1, **SEVERAL) as tracer:  # pyright: ignore[reportAttributeAccessIssue]
            found = tracer.result.images
        assert torch.equal(found, images)


@shows("cache", of=PIPELINES)
def test_every_call_of_every_module(family: Family) -> None:
    model = DiffusionModel(family.make())
    events = {
        (f"model.{event.path}", event.call): event
        for event in recorded(model, "5 6 7", 1, **SEVERAL)
        if event.kind == "output" and event.path.startswith("unet")
    }
    with model.generate("5 6 7", seed=1, **SEVERAL) as tracer:
        cache = tracer.cache(copy=True)
    found = {(path, i) for path in cache for i, _ in enumerate(cache[path].calls) if path.startswith("model.unet")}
    assert found == events.keys()
    for (path, i), event in events.items():
        leaves = copies_of(cache[path].calls[i].output)
        assert all(torch.equal(leaf, leaves[at]) for at, leaf in event.leaves.items()), path


@shows("source", of=PIPELINES)
def test_operations_of_an_attention(family: Family) -> None:
    model = DiffusionModel(family.make())
    module = model._module.get_submodule(family.attention)
    attend: Callable[[], Any] = lambda: envoy(model, family.attention).source.self_processor_0  # noqa: E731
    with hooks(on_output(module, scaled)):
        expected = plain(model.pipeline, "5 6 7", 1, **ONE_STEP)
    with model.trace("5 6 7", seed=1, output_type="pt") as tracer:
        operation = attend()
        operation.output = scaled(operation.output)
        images = tracer.result.images
    assert torch.equal(images, expected)
