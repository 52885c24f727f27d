"""The operations inside a forward, compared with what the forward computes when its lines are run by hand."""

import functools
import gc
import warnings
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nnsight import LanguageModel, NNsight
from nnsight.envoy._source import Source
from nnsight.errors import (
    NeverRanError,
    NotTracingError,
    OutOfOrderError,
    OutOfOrderWarning,
    SourceError,
    UnknownPathError,
)


def scaled(value, by=2.0):
    doubled = torch.mul(value, by)
    return torch.add(doubled, 1)


def logged(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return wrapper


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.rare = False

    def forward(self, x):
        h = self.lin(x)
        a = torch.tanh(h)
        b = scaled(a, by=3.0)
        if self.rare:
            b = torch.neg(b)
        for _ in range(2):
            b = torch.sin(b)
        return x + b


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(self.block(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def model(net):
    found = NNsight(net)
    found.trace(torch.zeros(1, 4))
    return found


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 4)


def by_hand(block, x):
    """Every value inside `Block.forward`."""
    h = block.lin(x)
    a = torch.tanh(h)
    b = scaled(a, by=3.0)
    return {"h": h, "a": a, "b": b, "sin_0": torch.sin(b), "out": x + torch.sin(torch.sin(b))}


def passes(net):
    """Counts calls of the root."""
    calls = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


class TestPrinting:
    def test_forward_with_names_of_its_operations(self, model):
        shown = str(model.blocks[0].source)
        assert "torch_tanh_0" in shown
        line = next(line for line in shown.splitlines() if line.startswith("torch_tanh_0"))
        assert line.split("->")[1].split(maxsplit=1)[1].strip() == "a = torch.tanh(h)"

    def test_operation_shows_the_lines_around_it(self, model):
        shown = str(model.blocks[0].source.scaled_0)
        assert "=>" in next(line for line in shown.splitlines() if line.startswith("scaled_0"))
        assert "def forward" in shown

    def test_recursive(self, model):
        assert "torch_mul_0" in str(model.blocks[0].source.scaled_0.source)

    def test_names(self, model):
        source = model.blocks[0].source
        names = ["self_lin_0", "torch_tanh_0", "scaled_0", "torch_neg_0", "range_0", "torch_sin_0"]
        assert list(source) == names
        assert len(source) == 6
        assert "scaled_0" in source
        assert "scaled_1" not in source
        assert set(names) < set(dir(source))

    def test_in_a_trace(self, model, x):
        with model.trace(x):
            shown = str(model.blocks[0].source)
            model.output
            assert str(model.blocks[0].source) == shown

    def test_unknown_operation(self, model):
        with pytest.raises(UnknownPathError, match=r"no operation 'torch_tan_0'.*torch_tanh_0"):
            model.blocks[0].source.torch_tan_0
        assert not hasattr(model.blocks[0].source, "nothing_like_it")

    def test_module_that_is_never_called(self, model):
        with pytest.raises(SourceError, match=r"model\.blocks is a ModuleList"):
            model.blocks.source

    def test_function_without_source(self, model):
        with pytest.raises(SourceError, match="no Python source"):
            model.blocks[0].source.torch_tanh_0.source

    def test_operation_that_calls_a_module(self, model):
        with pytest.raises(SourceError, match=r"model\.blocks\.0\.lin\.source"):
            model.blocks[0].source.self_lin_0.source

    def test_callee_that_only_a_run_knows(self, model):
        with pytest.raises(SourceError, match="only while the model runs"):
            model.source.block_0.source

    def test_value_outside_a_trace(self, model):
        with pytest.raises(NotTracingError):
            model.blocks[0].source.torch_tanh_0.output


class TestReading:
    def test_output(self, model, net, x):
        with model.trace(x):
            a = model.blocks[0].source.torch_tanh_0.output
        assert torch.equal(a, by_hand(net.blocks[0], x)["a"])

    def test_inputs(self, model, net, x):
        with model.trace(x):
            operation = model.blocks[0].source.scaled_0
            first, (args, kwargs) = operation.input, operation.inputs
            out = operation.output
            assert operation.input is first
        expected = by_hand(net.blocks[0], x)
        assert torch.equal(first, expected["a"])
        assert args[0] is first
        assert kwargs == {"by": 3.0}
        assert torch.equal(out, expected["b"])

    def test_several_operations_and_modules_in_order(self, model, net, x):
        calls = passes(net)
        with model.trace(x):
            source = model.blocks[1].source
            out0 = model.blocks[0].output
            h, a = source.self_lin_0.output, source.torch_tanh_0.output
            b, out1 = source.scaled_0.output, model.blocks[1].output
        expected = by_hand(net.blocks[1], out0)
        assert [torch.equal(found, expected[name]) for found, name in ((h, "h"), (a, "a"), (b, "b"))] == [True] * 3
        assert torch.equal(out1, expected["out"])
        assert len(calls) == 1

    def test_a_module_inside_and_then_an_operation(self, model, net, x):
        calls = passes(net)
        with model.trace(x):
            source = model.blocks[0].source
            model.blocks[0].lin.output
            a = source.torch_tanh_0.output
        assert torch.equal(a, by_hand(net.blocks[0], x)["a"])
        assert len(calls) == 1

    def test_after_the_input_of_the_module(self, model, net, x):
        calls = passes(net)
        with model.trace(x):
            given = model.blocks[1].input
            a = model.blocks[1].source.torch_tanh_0.output
        assert torch.equal(a, by_hand(net.blocks[1], given)["a"])
        assert len(calls) == 1

    def test_gradient(self, model, net, x):
        with model.trace(x):
            a = model.blocks[0].source.torch_tanh_0.output
            a.retain_grad()
            model.output.sum().backward()
        expected = by_hand(net.blocks[0], x)["a"].detach().requires_grad_()
        b = scaled(expected, by=3.0)
        net.head(net.blocks[1](x + torch.sin(torch.sin(b)))).sum().backward()
        assert torch.allclose(a.grad, expected.grad)

    def test_calls_of_a_loop_count(self, model, net, x):
        with model.trace(x):
            first = model.blocks[0].source.torch_sin_0.output
        assert torch.equal(first, by_hand(net.blocks[0], x)["sin_0"])

    def test_leaf_of_torch(self, model, net, x):
        with model.trace(x):
            out = model.head.source.F_linear_0.output
            weight = model.head.source.F_linear_0.inputs[0][1]
            whole = model.output
        assert torch.equal(out, whole)
        assert weight is net.head.weight

    def test_root(self, model, net, x):
        with model.trace(x):
            out = model.source.self_head_0.output
            assert out is model.output

    def test_same_numbers_as_without(self, model, net, x):
        plain = net(x)
        with model.trace(x):
            model.blocks[0].source.torch_sin_0.output
            model.blocks[1].source.scaled_0.source.torch_mul_0.input
            out = model.output
        assert torch.equal(out, plain)


class TestWriting:
    def test_output(self, model, net, x):
        with model.trace(x):
            model.blocks[0].source.scaled_0.output = torch.zeros(2, 4)
            out = model.blocks[0].output
        assert torch.equal(out, x)

    def test_in_place(self, model, net, x):
        with torch.no_grad(), model.trace(x):
            model.blocks[0].source.scaled_0.output[:] = 0
            out = model.blocks[0].output
        assert torch.equal(out, x)

    def test_input(self, model, net, x):
        with model.trace(x):
            model.blocks[0].source.scaled_0.input = torch.zeros(2, 4)
            b = model.blocks[0].source.scaled_0.output
        assert torch.equal(b, torch.ones(2, 4))

    def test_inputs(self, model, net, x):
        with model.trace(x):
            model.blocks[0].source.scaled_0.inputs = (torch.ones(2, 4),), {"by": 5.0}
            b = model.blocks[0].source.scaled_0.output
        assert torch.equal(b, torch.full((2, 4), 6.0))

    def test_is_repeated_by_a_second_pass(self, model, net, x):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with model.trace(x):
                model.blocks[0].source.scaled_0.output = torch.zeros(2, 4)
                model.output
                early = model.blocks[0].output
        assert torch.equal(early, x)
        assert [w.category for w in caught] == [OutOfOrderWarning]

    def test_tuple_items(self, x):
        class Split(nn.Module):
            def forward(self, x):
                a, b = torch.split(x, 2, dim=-1)
                return a - b

        model = NNsight(Split())
        with model.trace(x):
            model.source.torch_split_0.output[0] = torch.zeros(2, 2)
            out = model.output
        assert torch.equal(out, -x[:, 2:])


class TestSkipping:
    def test_operation(self, model, net, x):
        with model.trace(x):
            model.blocks[0].source.scaled_0.skip(torch.zeros(2, 4))
            out = model.blocks[0].output
        assert torch.equal(out, x)

    def test_what_is_inside_never_runs(self, model, net, x):
        with model.trace(x):
            operation = model.blocks[0].source.scaled_0
            operation.skip(operation.input)
            with pytest.raises(NeverRanError):
                operation.source.torch_mul_0.output

    def test_module_behind_a_skipped_operation(self, model, net, x):
        model.blocks[0].source.self_lin_0
        with model.trace(x):
            model.blocks[0].source.self_lin_0.skip(x)
            a = model.blocks[0].source.torch_tanh_0.output
        assert torch.equal(a, torch.tanh(x))


class TestNested:
    def test_function(self, model, net, x):
        with model.trace(x):
            doubled = model.blocks[0].source.scaled_0.source.torch_mul_0.output
            b = model.blocks[0].source.scaled_0.output
        expected = by_hand(net.blocks[0], x)
        assert torch.equal(doubled, expected["a"] * 3)
        assert torch.equal(b, expected["b"])

    def test_edit(self, model, net, x):
        with model.trace(x):
            model.blocks[0].source.scaled_0.source.torch_mul_0.output = torch.zeros(2, 4)
            b = model.blocks[0].source.scaled_0.output
        assert torch.equal(b, torch.ones(2, 4))

    def test_after_the_input_of_the_operation(self, model, net, x):
        calls = passes(net)
        with model.trace(x):
            operation = model.blocks[0].source.scaled_0
            a = operation.input
            doubled = operation.source.torch_mul_0.output
        assert torch.equal(doubled, a * 3)
        assert len(calls) == 1

    def test_unknown_operation(self, model):
        with pytest.raises(UnknownPathError, match="torch_mul_0"):
            model.blocks[0].source.scaled_0.source.torch_mull_0

    def test_callee_met_in_the_trace(self, x):
        class Chooses(nn.Module):
            def forward(self, x, functions):
                function = functions[0]
                return function(x)

        model = NNsight(Chooses())
        with model.trace(x, [scaled]):
            shown = str(model.source.function_0.source)
            doubled = model.source.function_0.source.torch_mul_0.output
        assert "torch_add_0" in shown
        assert torch.equal(doubled, x * 2)

    def test_module_met_in_the_trace(self, model, x):
        with model.trace(x):
            with pytest.raises(SourceError, match=r"model\.blocks\.0\.source"):
                model.source.block_0.source


class TestOrder:
    def test_late_read_of_a_module_that_was_running(self, model, net, x):
        calls = passes(net)
        with pytest.warns(OutOfOrderWarning, match=r"Naming model\.blocks\.0\.source before model\.blocks\.0 starts"):
            with model.trace(x):
                model.blocks[0].lin.output
                a = model.blocks[0].source.torch_tanh_0.output
        assert torch.equal(a, by_hand(net.blocks[0], x)["a"])
        assert len(calls) == 2

    def test_late_write_of_a_module_that_was_running(self, model, net, x):
        with pytest.raises(OutOfOrderError, match=r"Naming model\.blocks\.0\.source before model\.blocks\.0 starts"):
            with model.trace(x):
                model.blocks[0].lin.output
                model.blocks[0].source.torch_tanh_0.output = x

    def test_operations_out_of_order(self, model, net, x):
        calls = passes(net)
        with pytest.warns(OutOfOrderWarning, match="move this line up"):
            with model.trace(x):
                b = model.blocks[0].source.scaled_0.output
                a = model.blocks[0].source.torch_tanh_0.output
                h = model.blocks[0].source.self_lin_0.output
        expected = by_hand(net.blocks[0], x)
        assert [torch.equal(found, expected[name]) for found, name in ((h, "h"), (a, "a"), (b, "b"))] == [True] * 3
        assert len(calls) == 3

    def test_late_write(self, model, x):
        with pytest.raises(OutOfOrderError, match=r"torch_tanh_0\.output"):
            with model.trace(x):
                model.blocks[0].source.scaled_0.output
                model.blocks[0].source.torch_tanh_0.output = x

    def test_late_reads_share_a_second_pass(self, model, net, x):
        calls = passes(net)
        with pytest.warns(OutOfOrderWarning) as caught:
            with model.trace(x):
                model.output
                found = [model.blocks[i].source.scaled_0.output for i in range(2)]
                nested = model.blocks[1].source.scaled_0.source.torch_mul_0.output
        assert len(caught) == 1
        assert len(calls) == 3  # the last one is inside the function that ran before it
        first = by_hand(net.blocks[0], x)
        second = by_hand(net.blocks[1], first["out"])
        assert torch.equal(found[0], first["b"])
        assert torch.equal(found[1], second["b"])
        assert torch.equal(nested, second["a"] * 3)

    def test_operation_of_another_branch(self, model, net, x):
        with model.trace(x):
            model.output
        with pytest.raises(NeverRanError, match="does not run"):
            with model.trace(x):
                model.blocks[0].source.torch_neg_0.output

    def test_it_is_known_when_the_module_returns(self, model, net, x):
        with model.trace(x):
            model.output
        calls = passes(net)
        with model.trace(x):
            with pytest.raises(NeverRanError):
                model.blocks[0].source.torch_neg_0.output
            out = model.blocks[1].output
        assert torch.equal(out, net.blocks[1](net.blocks[0](x)))
        assert len(calls) == 1

    def test_it_is_known_at_once_when_the_module_has_returned(self, model, net, x):
        with model.trace(x):
            model.output
        with model.trace(x):
            model.blocks[0].source.scaled_0.output
            model.blocks[1].input
            with pytest.raises(NeverRanError):
                model.blocks[0].source.torch_neg_0.output
            assert model.blocks[1].input is model.blocks[1].source.self_lin_0.input

    def test_strict(self, model, x):
        with pytest.raises(OutOfOrderError, match="Strict"):
            with model.trace(x, strict_order=True):
                model.blocks[0].source.scaled_0.output
                model.blocks[0].source.torch_tanh_0.output

    def test_module_that_is_called_twice(self, x):
        torch.manual_seed(0)
        net = Twice()
        model = NNsight(net)
        with model.trace(x):
            a = model.block.source.torch_tanh_0.output
        assert torch.equal(a, by_hand(net.block, x)["a"])
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model.block.output
                a = model.block.source.torch_tanh_0.output
        assert torch.equal(a, by_hand(net.block, x)["a"])


class TestUntouched:
    def test_module(self, model, net, x):
        before = [dict(vars(m)) for m in net.modules()]
        with model.trace(x):
            model.blocks[0].source.scaled_0.source.torch_mul_0.output
        assert [dict(vars(m)) for m in net.modules()] == before

    def test_module_after_an_error(self, model, net, x):
        before = [dict(vars(m)) for m in net.modules()]
        with pytest.raises(ZeroDivisionError):
            with model.trace(x):
                model.blocks[0].source.scaled_0.output
                1 / 0
        assert [dict(vars(m)) for m in net.modules()] == before

    def test_only_what_is_asked_for_is_instrumented(self, model, net, x, monkeypatch):
        from nnsight.source import _intercept

        made = []
        monkeypatch.setattr(
            _intercept,
            "instrument",
            lambda f, d, g=_intercept.instrument, **o: made.append(f.__qualname__) or g(f, d, **o),
        )
        with model.trace(x):
            str(model.blocks[1].source)
            model.blocks[0].source.torch_tanh_0.output
            model.output
        assert made == ["Block.forward", "Block.forward"]  # both were named in the trace
        made.clear()
        source = model.blocks[1].source
        with model.trace(x):
            model.output
        assert made == []
        assert isinstance(source, Source)


class TestMemory:
    @pytest.fixture(autouse=True)
    def no_collector(self):
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    def test_nothing_outlives_the_model(self, x):
        model = NNsight(Net())
        seen = [weakref.ref(model._model)]
        with model.trace(x):
            source = model.blocks[0].source
            seen.append(weakref.ref(source.torch_tanh_0.output))
            inside = source.scaled_0.source
            seen.append(weakref.ref(inside.torch_mul_0.output))
            model.output
        assert [reference() is None for reference in seen] == [False, True, True]
        del model, source, inside
        assert seen[0]() is None

    def test_callee_met_in_the_trace(self, x):
        class Method(nn.Module):
            def forward(self, x):
                y = x + 1
                return y.square().sum()

        model = NNsight(Method())
        with model.trace(x):
            seen = weakref.ref(model.source.y_square_0.output)
            with pytest.raises(SourceError):
                model.source.y_square_sum_0.source
        assert seen() is None


class Doubles(ModelHook):
    def post_forward(self, module, output):
        return output * 2


class TestWrapped:
    def test_decorated_forward(self, x):
        class Decorated(nn.Module):
            @logged
            def forward(self, x):
                return torch.tanh(x) * 2

        model = NNsight(Decorated())
        with model.trace(x):
            a = model.source.torch_tanh_0.output
            model.source.torch_tanh_0.output = torch.ones(2, 4)
            out = model.output
        assert torch.equal(a, torch.tanh(x))
        assert torch.equal(out, torch.full((2, 4), 2.0))

    def test_forward_of_the_instance(self, model, net, x):
        add_hook_to_module(net.blocks[0], Doubles())
        with model.trace(x):
            assert "torch_tanh_0" in model.blocks[0].source
            a = model.blocks[0].source.torch_tanh_0.output
            out = model.blocks[0].output
        with torch.no_grad():
            expected = by_hand(net.blocks[0], x)
        assert torch.equal(a, expected["a"])
        assert torch.equal(out, expected["out"] * 2)

    def test_hooks_of_the_user(self, model, net, x):
        net.blocks[0].register_forward_hook(lambda module, args, output: output + 1)
        with model.trace(x):
            model.blocks[0].source.scaled_0.output = torch.zeros(2, 4)
            out = model.blocks[0].output
        assert torch.equal(out, x + 1)

    def test_module_applied_in_the_body(self, model, net, x):
        with model.trace(x):
            a = model.blocks[0].source.torch_tanh_0.output
            again = model.blocks[0](x)
        assert torch.equal(again, net.blocks[0](x))
        assert torch.equal(a, by_hand(net.blocks[0], x)["a"])


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=50, bos_token_id=0, eos_token_id=0)
    return LanguageModel(GPT2LMHeadModel(config).eval())


IDS = torch.tensor([[1, 2, 3, 4, 5]])


class TestTransformers:
    def test_print(self, gpt2):
        shown = str(gpt2.transformer.h[0].attn.source)
        line = next(line for line in shown.splitlines() if line.startswith("attention_interface_0 "))
        assert "-> " in line
        assert line.endswith("attn_output, attn_weights = attention_interface(")
        assert "self_c_proj_0" in shown
        assert "def sdpa_attention_forward" in str(gpt2.transformer.h[0].attn.source.attention_interface_0.source)

    def test_attention(self, gpt2):
        attn = gpt2.transformer.h[1].attn
        with gpt2.trace(IDS):
            mixed, weights = attn.source.attention_interface_0.output
            projected = attn.source.self_c_proj_0.input
            out = attn.output[0]
        assert weights is None
        assert mixed.shape == (1, 5, 2, 8)
        assert torch.equal(mixed.reshape(1, 5, 16), projected)
        assert torch.equal(out, attn._module.c_proj(projected))

    def test_root_and_stack_of_a_decorated_model(self, gpt2):
        with gpt2.trace(IDS):
            logits = gpt2.source.self_lm_head_0.output
            last = gpt2.output.logits
        assert torch.equal(logits, last)

    def test_with_the_pattern_of_the_same_layer(self, gpt2):
        attn = gpt2.transformer.h[1].attn
        with gpt2.trace(IDS):
            query = attn.source.attention_interface_0.inputs[0][1]
            pattern = attn.attn_dropout.input
            mixed = attn.source.attention_interface_0.output[0]
        assert query.shape == (1, 2, 5, 8)
        assert torch.allclose(pattern.sum(-1), torch.ones(1, 2, 5))
        with gpt2.trace(IDS):
            value = attn.source.attention_interface_0.inputs[0][3]
        assert torch.allclose((pattern @ value).transpose(1, 2), mixed, atol=1e-6)

    def test_pattern_asked_for_first(self, gpt2):
        attn = gpt2.transformer.h[1].attn
        with gpt2.trace(IDS):
            source = attn.source
            pattern = attn.attn_dropout.input
            projected = source.self_c_proj_0.input
        assert pattern.shape == (1, 2, 5, 5)
        assert projected.shape == (1, 5, 16)

    def test_nested_in_attention(self, gpt2):
        attn = gpt2.transformer.h[0].attn
        with gpt2.trace(IDS):
            inside = attn.source.attention_interface_0.source
            name = "torch_nn_functional_scaled_dot_product_attention_0"
            mixed = inside[name].output
            out = attn.source.attention_interface_0.output[0]
        assert torch.equal(mixed.transpose(1, 2), out)

    def test_llama(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
        config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
        model = LanguageModel(LlamaForCausalLM(config).eval())
        attn = model.model.layers[1].self_attn
        with model.trace(IDS):
            query, _ = attn.source.apply_rotary_pos_emb_0.output
            rotated = attn.source.apply_rotary_pos_emb_0.source.rotate_half_0
            model.output
        assert query.shape == (1, 4, 5, 4)
        assert "rotate_half" in repr(rotated)

    def test_each_step_of_a_generation(self, gpt2):
        operation = gpt2.transformer.h[1].attn.source.attention_interface_0
        with gpt2.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
            shapes = []
            for _ in tracer.iter[:]:
                shapes.append(operation.output[0].shape[1])
            out = tracer.result
        assert shapes == [5, 1, 1]
        assert out.shape == (1, 8)

    def test_edit_at_one_step(self, gpt2):
        plain = gpt2.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, trace=False)
        seen = []
        with gpt2.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
            for step in tracer.iter[1:3]:
                operation = gpt2.transformer.h[1].attn.source.attention_interface_0
                if step == 1:
                    operation.source
                    operation.output[0][:] = 0
                seen.append(operation.output[0].abs().sum().item())
            out = tracer.result
        assert seen[0] == 0 < seen[1]
        assert torch.equal(out[:, :6], plain[:, :6])

    def test_late_in_a_generation(self, gpt2):
        attn = gpt2.transformer.h[1].attn
        with pytest.raises(OutOfOrderError, match="at the top of the block"):
            with gpt2.generate(IDS, max_new_tokens=3, do_sample=False) as tracer:
                for _ in tracer.iter[:]:
                    attn.c_attn.output
                    attn.source.attention_interface_0.output

    def test_named_at_the_top_of_a_generation(self, gpt2):
        attn = gpt2.transformer.h[1].attn
        with gpt2.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
            source = attn.source
            count = 0
            for _ in tracer.iter[:]:
                attn.c_attn.output
                source.attention_interface_0.output
                count += 1
        assert count == 3

    def test_invokes(self, gpt2):
        operation = gpt2.transformer.h[1].attn.source.attention_interface_0
        alone = []
        for ids in (IDS, IDS.flip(-1)):
            with gpt2.trace(ids):
                alone.append(operation.output[0])
        with gpt2.trace() as tracer:
            with tracer.invoke(IDS):
                first = operation.output[0]
            with tracer.invoke(IDS.flip(-1)):
                second = operation.output[0]
        assert torch.allclose(first, alone[0], atol=1e-5)
        assert torch.allclose(second, alone[1], atol=1e-5)
