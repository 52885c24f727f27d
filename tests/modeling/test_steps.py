"""The steps of a generation, where a model inside another one does the generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch.nn import Module

from nnsight import TransformersModel
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
