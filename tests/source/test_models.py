"""Real forwards: instrumented they give what they give, bit for bit."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward as gpt2_eager
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_eager

from nnsight.errors import SourceError
from nnsight.source import analyse, instrument


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else []
    return [found for item in values for found in tensors(item)]


def assert_same(one, other):
    assert type(one) is type(other)
    assert len(tensors(one)) == len(tensors(other)) > 0
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def calls_of(model, tokens) -> list[tuple[torch.nn.Module, tuple, dict, object]]:
    """Every call of a module in one forward pass: module, positional and keyword arguments, output."""
    found = []

    def hook(module, args, kwargs, output):
        found.append((module, args, kwargs, output))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in model.modules()]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def assert_every_module_gives_the_same(model, tokens, recorder) -> set[str]:
    """The classes of modules of which an operation ran."""
    before = [dict(vars(module)) for module in model.modules()]
    seen = set()
    for module, args, kwargs, output in calls_of(model, tokens):
        record = recorder()
        assert_same(instrument(module, record)(*args, **kwargs), output)
        assert set(record.names) <= analyse(module).operations.keys()
        if record.names:
            seen.add(type(module).__name__)
    assert [dict(vars(module)) for module in model.modules()] == before
    return seen


@torch.no_grad()
def test_gpt2_gives_the_same(gpt2_small, tokens, recorder):
    seen = assert_every_module_gives_the_same(gpt2_small, tokens, recorder)
    assert seen >= {"GPT2Attention", "GPT2Block", "GPT2MLP", "GPT2Model", "GPT2LMHeadModel", "LayerNorm"}


@torch.no_grad()
def test_llama_gives_the_same(llama, tokens, recorder):
    seen = assert_every_module_gives_the_same(llama, tokens, recorder)
    assert seen >= {
        "LlamaAttention",
        "LlamaDecoderLayer",
        "LlamaForCausalLM",
        "LlamaRotaryEmbedding",
        "Linear",
    }


@torch.no_grad()
def test_mixtral_gives_the_same(mixtral, tokens, recorder):
    seen = assert_every_module_gives_the_same(mixtral, tokens, recorder)
    assert seen >= {"MixtralSparseMoeBlock", "MixtralExperts", "MixtralTopKRouter", "MixtralDecoderLayer"}


def test_into_the_attention_function(gpt2_small, tokens, recorder):
    """A dispatch that instruments what an operation calls, and one that changes a result in it."""
    eager = gpt2_small.config._attn_implementation == "eager"
    attn = gpt2_small.transformer.h[0].attn
    inside = recorder()

    def dispatch(name, f, args, kwargs):
        if name != "attention_interface_0":
            return f(*args, **kwargs)
        assert f is (gpt2_eager if eager else sdpa_attention_forward)
        return instrument(f, inside)(*args, **kwargs)

    x = torch.randn(2, 5, 32)
    assert_same(instrument(attn, dispatch)(x), attn(x))
    expected = "nn_functional_softmax_0" if eager else "torch_nn_functional_scaled_dot_product_attention_0"
    assert expected in inside.names
    assert set(inside.names) <= analyse(gpt2_eager if eager else sdpa_attention_forward).operations.keys()


def test_a_changed_operation_changes_what_follows(gpt2_small, recorder):
    attn = gpt2_small.transformer.h[0].attn
    x, instead = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    output = instrument(attn, recorder(self_c_proj_0=instead))(x)[0]
    assert torch.equal(output, attn.resid_dropout(instead))
    assert not torch.equal(output, attn(x)[0])


def test_gradients_are_the_same(llama, tokens):
    def plain(name, f, args, kwargs):
        return f(*args, **kwargs)

    grads = []
    for forward in (llama.forward, instrument(llama, plain)):
        llama.zero_grad()
        forward(input_ids=tokens, labels=tokens).loss.backward()
        grads.append([p.grad.clone() for p in llama.parameters()])
    llama.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("function", [gpt2_eager, llama_eager, sdpa_attention_forward])
def test_attention_functions(function, recorder):
    class Module(torch.nn.Module):
        num_key_value_groups = 1
        is_causal = True

    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
    record = recorder()
    module = Module().eval()
    once = function(module, query, key, value, None, dropout=0.0, scaling=0.3)
    again = instrument(function, record)(module, query, key, value, None, dropout=0.0, scaling=0.3)
    assert_same(once, again)
    assert record.names


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(training, recorder):
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    x = torch.randn(2, 5, 8)
    record = recorder()
    assert_same(instrument(layer, record)(x, x, x), layer(x, x, x))
    assert record.names


def test_a_wrapper_that_may_choose_another_function(mixtral):
    """The experts' wrapper picks an implementation by the config; its own operations say which."""
    experts = mixtral.model.layers[0].mlp.experts
    assert "torch_zeros_like_0" in analyse(experts).operations
    assert list(analyse(experts, unwrap=False).operations) == [
        "experts_interface_get_interface_0",
        "experts_forward_0",
    ]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_module_is_refused():
    with pytest.raises(SourceError, match="no Python source"):
        analyse(torch.jit.freeze(torch.jit.script(torch.nn.Linear(2, 2).eval())))
