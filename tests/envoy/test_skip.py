"""Skipping, compared with models in which the skipped module is replaced by one that returns the value."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from nnsight import LanguageModel, NNsight
from nnsight.errors import NeverRanError, NotTracingError, OutOfOrderError, OutOfOrderWarning


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.inner(x)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *args, **kwargs):
        return self.value


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4)))


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 4)


class TestModule:
    def test_value_is_the_output(self, net, x):
        value = torch.ones(2, 4)
        model = NNsight(net)
        with model.trace(x):
            model[1].skip(value)
            after, out = model[1].output, model.output
        assert torch.equal(after, value)
        assert torch.equal(out, net[3](net[2](value)))

    def test_forward_is_not_run(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            model[1].skip(model[0].output)
            model[2].output
        assert [block.calls for block in net] == [1, 0, 1, 1]

    def test_first_trace_and_later_ones(self, net, x):
        model = NNsight(net)
        expected = net[3](net[2](net[0](x)))
        for _ in range(3):
            with model.trace(x):
                model[1].skip(model[1].input)
                out = model.output
            assert torch.equal(out, expected)
        with model.trace(x):
            tanh = model[1].inner[1].output
        assert torch.equal(tanh, net[1].inner(net[0](x)))

    def test_several(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            for i in (1, 2):
                model[i].skip(model[i].input)
            out = model.output
        assert torch.equal(out, net[3](net[0](x)))

    def test_leaf(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            model[0].inner[1].skip(torch.zeros(2, 4))
            out = model[0].output
        assert torch.equal(out, x)

    def test_root(self, net, x):
        model = NNsight(net)
        with model.trace(x) as tracer:
            model.skip(x * 2)
            result = tracer.result
        assert torch.equal(result, x * 2)

    def test_input_can_still_be_read(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            model[1].skip(torch.zeros(2, 4))
            before = model[1].input
            after = model[1].output
            again = model[1].input
        assert torch.equal(before, net[0](x))
        assert again is before
        assert not after.any()

    def test_output_can_be_edited(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            model[3].skip(torch.zeros(2, 4))
            model[3].output += 1
            out = model.output
        assert torch.equal(out, torch.ones(2, 4))

    def test_gradient_flows_through_the_value(self, net, x):
        x.requires_grad_()
        model = NNsight(net)
        with model.trace(x):
            model[1].skip(model[0].output * 3)
            out = model.output
        out.sum().backward()
        given, x.grad = x.grad, None
        net[3](net[2](net[0](x) * 3)).sum().backward()
        assert torch.allclose(given, x.grad)

    def test_hooks_of_the_user_see_the_value(self, net, x):
        net[1].register_forward_hook(lambda module, args, output: output + 1)
        model = NNsight(net)
        with model.trace(x):
            model[1].skip(torch.zeros(2, 4))
            out = model[1].output
        assert torch.equal(out, torch.ones(2, 4))

    def test_too_late(self, net, x):
        model = NNsight(net)
        with pytest.raises(OutOfOrderError, match=r"model\.1"):
            with model.trace(x):
                model[1].output
                model[1].skip(x)

    def test_outside_a_trace(self, net, x):
        with pytest.raises(NotTracingError):
            NNsight(net)[1].skip(x)

    def test_is_repeated_by_a_second_pass(self, net, x):
        model = NNsight(net)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with model.trace(x):
                model[1].skip(torch.ones(2, 4))
                model[3].output
                early, before = model[2].output, model[0].output
        assert torch.equal(early, net[2](torch.ones(2, 4)))
        assert torch.equal(before, net[0](x))
        assert {w.category for w in caught} == {OutOfOrderWarning}


class TestInside:
    def test_asked_for_after_the_skip(self, net, x):
        model = NNsight(net)
        with pytest.raises(NeverRanError, match=r"model\.1\.inner\.1\.output .* inside a module that is skipped"):
            with model.trace(x):
                model[1].skip(x)
                model[1].inner[1].output

    def test_it_is_known_at_once(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            model[1].skip(x)
            for place in (model[1].inner, model[1].inner[0]):
                with pytest.raises(NeverRanError):
                    place.output
            out = model[2].output
            with pytest.raises(NeverRanError):
                model[1].inner[1].output
            assert model[2].output is out

    def test_operation_of_a_skipped_module(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            model.output
        with model.trace(x):
            model[1].skip(x)
            with pytest.raises(NeverRanError):
                model[1].source.self_inner_0.output
            model[2].output

    def test_a_block_that_waits_inside_goes_on(self, net, x):
        model = NNsight(net)
        seen = []
        with model.trace() as tracer:
            with tracer.invoke(x):
                out = model.output
            with tracer.invoke():
                try:
                    model[1].inner[0].output
                except NeverRanError:
                    seen.append(model[2].input)
            with tracer.invoke():
                model[1].skip(torch.zeros(2, 4))
        assert torch.equal(seen[0], torch.zeros(2, 4))
        assert torch.equal(out, net[3](net[2](torch.zeros(2, 4))))

    def test_shared_module_that_runs_elsewhere_too(self, x):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.lin = nn.Linear(4, 4)
                self.first = nn.Sequential(self.lin)
                self.second = nn.Sequential(self.lin)

            def forward(self, x):
                return self.second(self.first(x))

        net = Tied()
        model = NNsight(net)
        for _ in range(2):
            with model.trace(x):
                model.first.skip(x * 2)
                out = model.second[0].output
            assert torch.equal(out, net.lin(x * 2))

    def test_module_called_twice_and_skipped_once(self, net, x):
        class Twice(nn.Module):
            def __init__(self, block):
                super().__init__()
                self.block = block

            def forward(self, x):
                return self.block(self.block(x))

        model = NNsight(Twice(net[0]))
        with model.trace(x):
            model.output
        with model.trace(x):
            model.block.skip(x * 2)
            with pytest.raises(NeverRanError):
                model.block.inner.output
            out = model.output
        assert torch.equal(out, net[0](x * 2))


class TestInvokes:
    def test_whole_batch(self, net, x):
        model = NNsight(net)
        with model.trace() as tracer:
            with tracer.invoke(x):
                first = model.output
            with tracer.invoke(x + 1):
                second = model.output
            with tracer.invoke():
                model[1].skip(model[1].input)
        expected = net[3](net[2](net[0](torch.cat([x, x + 1]))))
        assert torch.allclose(torch.cat([first, second]), expected)

    def test_one_of_several(self, net, x):
        model = NNsight(net)
        with model.trace() as tracer:
            with tracer.invoke(x):
                model[1].skip(model[1].input * 3)
                skipped = model.output
            with tracer.invoke(x):
                plain = model.output
        assert torch.allclose(skipped, net[3](net[2](net[0](x) * 3)))
        assert torch.allclose(plain, net(x))


IDS = torch.tensor([[1, 2, 3, 4, 5]])
SIZES = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=2, n_embd=16, **SIZES)).eval(), "transformer.h"


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **SIZES)).eval(), "model.layers"


def gptj():
    return GPTJForCausalLM(GPTJConfig(n_layer=3, n_head=2, n_embd=16, rotary_dim=4, **SIZES)).eval(), "transformer.h"


@pytest.fixture(params=[gpt2, llama, gptj], ids=lambda make: make.__name__)
def family(request):
    torch.manual_seed(0)
    return request.param()


class TestBlocks:
    """A block is skipped with its hidden states, or a tuple of them, whatever it returns itself."""

    @pytest.mark.parametrize("form", ["tensor", "tuple", "output"])
    def test_every_form(self, family, form):
        module, path = family
        model = LanguageModel(module)
        blocks = model.get(path)
        value = torch.randn(1, 5, 16)
        with model.trace(IDS):
            if form == "output":
                value = blocks[0].output.clone()
                blocks[1].skip(blocks[0].output)
            else:
                blocks[1].skip(value if form == "tensor" else (value,))
            hidden = blocks[1].output[0]
            logits = model.output.logits
        assert torch.equal(hidden, value)
        other = copy.deepcopy(module)
        native = module.get_submodule(path)[1](torch.randn(1, 5, 16), **_position(module))
        constant = Constant((value,) if isinstance(native, tuple) else value)
        other.get_submodule(path)[1] = constant
        if form == "output":
            with torch.no_grad():
                assert torch.allclose(logits, other(IDS, use_cache=False).logits, atol=1e-6)
        else:
            assert torch.equal(logits, other(IDS, use_cache=False).logits)

    def test_output_of_a_block_for_another_module(self, family):
        module, path = family
        model = LanguageModel(module)
        block = model.get(path)[1]
        norm = model.get(f"{path.rpartition('.')[0]}.{'norm' if 'layers' in path else 'ln_f'}")
        with model.trace(IDS):
            hidden = block.output
            norm.skip(hidden)
            given = model.lm_head.input
            logits = model.lm_head.output
        assert type(given) is torch.Tensor
        assert torch.equal(logits, module.lm_head(hidden))

    def test_at_one_step_of_a_generation(self, family):
        module, path = family
        model = LanguageModel(module)
        block = model.get(path)[1]
        sizes = []
        with model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False) as tracer:
            for step in tracer.iter[:]:
                if step == 1:
                    block.skip(block.input)
                sizes.append(block.output[0].shape[1])
        assert sizes == [5, 6, 7]


def _position(module):
    if hasattr(module, "model"):
        return {"position_embeddings": module.model.rotary_emb(torch.randn(1, 5, 16), torch.arange(5)[None])}
    return {"position_ids": torch.arange(5)[None]} if module.config.model_type == "gptj" else {}
