"""VisionLanguageModel: texts with any number of images, alone and as one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnsight import VisionLanguageModel

from . import small

IMAGES = [small.image(i, 16 + 8 * i, 16 + 8 * (i % 2)) for i in range(4)]
INPUTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("<image> what is this",), {"images": [IMAGES[0]]}),
    (("<image> and <image> is in the tower",), {"images": IMAGES[1:3]}),
    (("the cat is red",), {}),
    ((IMAGES[3], "what <image>"), {}),
]
WITHOUT_IMAGES = 2
MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llava": (small.llava, "model.vision_tower.encoder.layers.0", "model.multi_modal_projector"),
    "qwen2_vl": (small.qwen2_vl, "model.visual.blocks.0", "model.visual.merger"),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[VisionLanguageModel, str, str]:
    build, block, projector = MODELS[request.param]
    net, processor = build()
    return VisionLanguageModel(net, processor=processor), block, projector


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_trace_is_the_plain_call(case: tuple[VisionLanguageModel, str, str]) -> None:
    model, *_ = case
    encoding = model.processor(text="<image> what is this", images=[IMAGES[0]], return_tensors="pt")
    expected = model._module(**encoding).logits
    (args, kwargs), *_ = INPUTS
    assert torch.equal(model.trace(*args, **kwargs, trace=False).logits, expected)
    assert torch.equal(model.trace(encoding, trace=False).logits, expected)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "what is this"}]}
    ]
    assert torch.equal(model.trace(chat, trace=False).logits, expected)


def test_invokes_with_any_number_of_images(case: tuple[VisionLanguageModel, str, str]) -> None:
    model, block, projector = case
    found: dict[int, Any] = {}
    with model.trace() as tracer:
        for i, (args, kwargs) in enumerate(INPUTS):
            with tracer.invoke(*args, **kwargs):
                seen = projected = None
                if i != WITHOUT_IMAGES:
                    seen, projected = model.get(block).output, model.get(projector).output
                hidden = model.model.language_model.layers[0].output
                found[i] = seen, projected, hidden, model.output.logits
    for i, (args, kwargs) in enumerate(INPUTS):
        with model.trace(*args, **kwargs):
            if i != WITHOUT_IMAGES:
                seen, projected = model.get(block).output.save(), model.get(projector).output.save()
                assert close(found[i][0], seen)
                assert close(found[i][1], projected)
            hidden, logits = model.model.language_model.layers[0].output.save(), model.output.logits.save()
        length = logits.shape[1]
        assert close(found[i][2][:, -length:], hidden)
        assert close(found[i][3][:, -length:], logits)


def test_edits_of_images_stay_with_their_invoke(case: tuple[VisionLanguageModel, str, str]) -> None:
    model, _, projector = case
    logits: dict[int, Any] = {}
    with model.trace() as tracer:
        for i, (args, kwargs) in enumerate(INPUTS):
            with tracer.invoke(*args, **kwargs):
                if i == 0:
                    model.get(projector).output = model.get(projector).output * 0.5
                if i == 3:
                    model.get(projector).output[:] = 1
                logits[i] = model.output.logits
    for i, (args, kwargs) in enumerate(INPUTS):
        with model.trace(*args, **kwargs):
            if i == 0:
                model.get(projector).output = model.get(projector).output * 0.5
            if i == 3:
                model.get(projector).output[:] = 1
            expected = model.output.logits.save()
        assert close(logits[i][:, -expected.shape[1] :], expected)


def test_generation(case: tuple[VisionLanguageModel, str, str]) -> None:
    model, *_ = case
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    tokens: dict[int, torch.Tensor] = {}
    steps: dict[int, list[torch.Tensor]] = {}
    with model.generate(**options) as tracer:
        for i, (args, kwargs) in enumerate(INPUTS):
            with tracer.invoke(*args, **kwargs):
                steps[i] = []
                with tracer.iter[:]:
                    steps[i].append(model.lm_head.output[:, -1])
                tokens[i] = model.generator.output
    for i, (args, kwargs) in enumerate(INPUTS):
        plain = model.generate(*args, **kwargs, **options, trace=False)
        assert torch.equal(tokens[i][:, -4:], plain[:, -4:])
        with model.generate(*args, **kwargs, **options) as tracer:
            alone = [model.lm_head.output[:, -1].save() for _ in tracer.iter[:]]
        assert len(alone) == len(steps[i]) == 4
        assert all(close(one, other) for one, other in zip(steps[i], alone, strict=True))


def test_edits_while_generating(case: tuple[VisionLanguageModel, str, str]) -> None:
    model, _, projector = case
    (args, kwargs), *_ = INPUTS
    with model.generate(*args, **kwargs, max_new_tokens=3, do_sample=False, eos_token_id=None):
        model.get(projector).output[:] = 0
        logits = model.lm_head.output[:, -1].save()
    with model.trace(*args, **kwargs):
        model.get(projector).output[:] = 0
        expected = model.lm_head.output[:, -1].save()
    assert close(logits, expected)
    assert not close(logits, model.trace(*args, **kwargs, trace=False).logits[:, -1])


def test_the_forward_ends_after_the_last_request(case: tuple[VisionLanguageModel, str, str]) -> None:
    model, block, projector = case
    (args, kwargs), *_ = INPUTS
    with model.trace(*args, **kwargs):
        expected = model.get(block).output.clone()
    ran: list[str] = []
    handle = model.get(projector)._module.register_forward_hook(lambda *_: ran.append(projector))
    with model.trace(*args, **kwargs, stop_after_last=True):
        found = model.get(block).output.clone()
    handle.remove()
    assert torch.equal(found, expected)
    assert ran == []
