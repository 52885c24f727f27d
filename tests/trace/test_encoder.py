"""Generation of an encoder-decoder: the encoder runs once, before the first step, and belongs to it."""

from __future__ import annotations

import pytest
import torch
from zoo import FAMILIES, build
from zoo.plain import hooks, on_output

from nnsight import LanguageModel, NNsight
from nnsight.errors import NeverRanError, OrderError, OutOfOrderError

IDS = torch.tensor([[5, 6, 7, 8, 9]])
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def net():
    return build(FAMILIES["t5"])


@pytest.fixture
def model(net):
    return LanguageModel(net)


@torch.no_grad()
def test_an_iteration_sees_it_in_the_first_step(model, net):
    encoded, steps = [], 0
    with model.generate(IDS, **OPTIONS) as tracer:
        for step in tracer.iter[:]:
            if step == 0:
                encoded.append(model.encoder.block[1].output[0].clone())
            model.decoder.block[1].output
            steps += 1
    kept = []
    with hooks(net.encoder.block[1].register_forward_hook(lambda _m, _a, output: kept.append(output))):
        net.generate(IDS, **OPTIONS)
    assert steps == 4
    assert len(kept) == 1
    assert torch.equal(encoded[0], kept[0][0] if isinstance(kept[0], tuple) else kept[0])


@torch.no_grad()
def test_later_steps_have_none(model):
    with pytest.raises(OrderError, match="encoder"), model.generate(IDS, **OPTIONS) as tracer:
        for _ in tracer.iter[:]:
            model.encoder.block[1].output


@torch.no_grad()
def test_a_lasting_edit_of_both_parts_is_refused_where_it_would_miss_one(model):
    """In the second step the block waits for the encoder, and the decoder goes by."""
    with model.edit() as edited:
        model.encoder.block[1].output[0][:] *= 1.5
        model.decoder.block[1].output[0][:] *= 1.5
    with pytest.raises(OutOfOrderError, match="encoder"), edited.generate(IDS, **OPTIONS):
        pass


@torch.no_grad()
def test_two_lasting_edits_of_one_part_each(model, net):
    with model.edit() as edited:
        model.encoder.block[1].output[0][:] *= -2
    with edited.edit(inplace=True):
        model.decoder.block[1].output[0][:] *= -2
    with edited.generate(IDS, **OPTIONS):
        found = edited.generator.output
    parts = net.encoder.block[1], net.decoder.block[1]
    with hooks(*(on_output(part, lambda hidden: hidden * -2) for part in parts)):
        expected = net.generate(IDS, **OPTIONS)
    assert torch.equal(found, expected)
    assert not torch.equal(found, net.generate(IDS, **OPTIONS))


class Late(torch.nn.Module):
    """A leaf that the first call leaves out."""

    def __init__(self):
        super().__init__()
        self.layer, self.late = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.late(self.layer(x)) if self.calls % 2 == 0 else self.layer(x)

    def generate(self, x):
        return self(self(x))


def test_a_leaf_of_the_second_step_is_not_taken_for_the_firsts():
    class Model(NNsight):
        def generate(self, x):
            from nnsight._core import Call
            from nnsight.trace import Given, Prepared, Tracer

            call = Call(self._module.generate, (x,), {}, repeatable=False)
            return Tracer(self._tree, lambda _: Prepared(call, [1]), Given((x,), {}))

    model = Model(Late())
    for _ in range(2):
        with pytest.raises((NeverRanError, OutOfOrderError)), model.generate(torch.ones(1, 3)) as tracer:
            for _ in tracer.iter[0]:
                model.late.output
        model._module.calls = 0
        with model.generate(torch.ones(1, 3)) as tracer:
            for _ in tracer.iter[1]:
                second = model.late.output
        assert second.shape == (1, 3)
        model._module.calls = 0
