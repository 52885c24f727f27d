"""The steps of a generation, where a model inside another one does the generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch.nn import Module

from nnsight import LanguageModel, TransformersModel
from nnsight.errors import OrderError

from . import small

IDS = torch.tensor([[1, 5, 6], [1, 7, 8]])
OPTIONS = {"max_new_tokens": 3, "do_sample": False}


def blip() -> Module:
    text = {
        **small.TEXT,
        "encoder_hidden_size": 32,
        "projection_dim": 16,
        "max_position_embeddings": 32,
        "sep_token_id": 3,
    }
    config = tf.BlipConfig(text_config=text, vision_config={**small.VISION, "projection_dim": 16}, projection_dim=16)
    return small.lively(tf.BlipForConditionalGeneration(config))


def test_each_step_of_a_decoder_inside() -> None:
    net, pixels, found = blip(), torch.rand(2, 3, 16, 16), []
    net.text_decoder.register_forward_hook(lambda _m, _a, output: found.append(output.logits))
    expected = net.generate(pixel_values=pixels, input_ids=IDS, **OPTIONS)
    plain, steps = found.copy(), []
    model = TransformersModel(net)
    with model.generate(pixel_values=pixels, input_ids=IDS, **OPTIONS) as tracer:
        image = model.vision_model.output.last_hidden_state.save()
        for _ in tracer.iter[:]:
            steps.append(model.text_decoder.output.logits)
        ids = model.generator.output.save()
    assert image.shape == (2, 17, 32)
    assert torch.equal(ids, expected)
    assert len(steps) == len(plain) >= 2
    assert all(torch.equal(one + 0, other) for one, other in zip(steps, plain, strict=True))


def test_an_edit_of_every_step_of_a_decoder_inside() -> None:
    model, pixels = TransformersModel(blip()), torch.rand(2, 3, 16, 16)
    with model.edit() as edited:
        model.text_decoder.cls.output[:, :, 9] = 1e4
    with edited.generate(pixel_values=pixels, input_ids=IDS, **OPTIONS):
        ids = edited.generator.output.save()
    assert bool((ids[:, 2:] == 9).all())


def test_a_trace_of_a_model_around_a_decoder() -> None:
    net, pixels = blip(), torch.rand(2, 3, 16, 16)
    model = TransformersModel(net)
    with torch.no_grad(), model.trace(pixel_values=pixels, input_ids=IDS):
        given = model.inputs[1]["pixel_values"].save()
        hidden = model.text_decoder.bert.encoder.layer[0].output.clone()
        logits = model.output.logits.save()
    with torch.no_grad():
        assert torch.equal(logits, net(pixel_values=pixels, input_ids=IDS).logits)
    assert torch.equal(given, pixels)
    assert hidden.shape == (2, 3, 32)


class Talker(tf.PreTrainedModel):
    """Generates by two parts, and never calls itself."""

    config_class = tf.GPT2Config
    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__(tf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=2))
        self.one, self.two = tf.GPT2LMHeadModel(self.config), tf.GPT2LMHeadModel(self.config)

    def generate(self, **options: Any) -> torch.Tensor:
        first = self.one.generate(**options)
        return self.two.generate(**{**options, "input_ids": first, "attention_mask": torch.ones_like(first)})


def test_steps_that_cannot_be_counted_are_refused() -> None:
    model = TransformersModel(Talker().eval())
    for bounds in (slice(None), slice(1, 2)):
        with pytest.raises(OrderError, match="calls of Talker, and there was none"):
            with model.generate(IDS, **OPTIONS, pad_token_id=0, eos_token_id=None) as tracer:
                for _ in tracer.iter[bounds]:
                    model.one.lm_head.output
    with model.edit() as edited:
        model.one.lm_head.output[:] = 0
    with pytest.raises(OrderError, match="Wrap that part"):
        with edited.generate(IDS, **OPTIONS, pad_token_id=0, eos_token_id=None):
            pass
    with model.generate(IDS, **OPTIONS, pad_token_id=0, eos_token_id=None):
        first = model.one.lm_head.output.clone()
        ids = model.generator.output.save()
    assert first.shape == (2, 1, 20)
    assert ids.shape == (2, 9)


# --- what the model itself is called with at each step ------------------------------------------------------------


def gpt2() -> Module:
    config = tf.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=22, bos_token_id=1, eos_token_id=2)
    return small.lively(tf.GPT2LMHeadModel(config))


GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def hooked_inputs(net: Any) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    handle = net.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    net.generate(IDS, **GREEDY)
    handle.remove()
    return seen


@pytest.mark.parametrize("form", ["loop", "block", "next", "all"])
def test_inputs_of_the_model_at_each_step(form: str) -> None:
    net = gpt2()
    model, expected = LanguageModel(net), hooked_inputs(gpt2())
    ids, positions, hidden = [], [], []

    def read() -> None:
        ids.append(model.input)
        positions.append(model.inputs[1]["position_ids"])
        hidden.append(model.transformer.h[0].output.shape[1])

    with model.generate(IDS, **GREEDY) as tracer:
        if form == "loop":
            for _ in tracer.iter[:]:
                read()
        elif form == "block":
            with tracer.iter[:]:
                read()
        elif form == "all":
            with tracer.all():
                read()
        else:
            for step in range(4):
                read()
                if step < 3:
                    tracer.next()
    assert hidden == [3, 1, 1, 1]
    for step, plain in enumerate(expected):
        assert torch.equal(ids[step], plain["input_ids"])
        assert torch.equal(positions[step], plain["position_ids"])
    assert len(ids) == len(expected) == 4


def test_inputs_of_the_model_are_changed_at_one_step() -> None:
    net, seen = gpt2(), []

    def other_token(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        seen.append(1)
        return (args, {**kwargs, "input_ids": kwargs["input_ids"] * 0 + 9}) if len(seen) == 3 else None

    handle = net.register_forward_pre_hook(other_token, with_kwargs=True)
    expected = net.generate(IDS, **GREEDY)
    handle.remove()
    model = LanguageModel(net)
    with model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.iter[2]:
            args, kwargs = model.inputs
            model.inputs = args, {**kwargs, "input_ids": kwargs["input_ids"] * 0 + 9}
        ids = model.generator.output.save()
    assert torch.equal(ids, expected)
    assert not torch.equal(ids, net.generate(IDS, **GREEDY))


def test_inputs_of_the_model_in_invokes() -> None:
    model = LanguageModel(gpt2())
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    with model.generate(**GREEDY) as tracer:
        for row in (0, 1):
            with tracer.invoke(IDS[row : row + 1]):
                with tracer.iter[:]:
                    found[row].append(model.input)
                    model.lm_head.output[:, -1, 7] = 1e4 if row else -1e4
    for row in (0, 1):
        assert torch.equal(found[row][0], IDS[row : row + 1])
        assert [tuple(ids.shape) for ids in found[row][1:]] == [(1, 1)] * 3
        assert all(bool((ids == 7).all()) == bool(row) for ids in found[row][1:])
