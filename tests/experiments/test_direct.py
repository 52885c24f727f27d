"""Direct logit attribution, against the same from the plain module's weights."""

import pytest
import torch

from nnsight import LanguageModel, errors
from nnsight.experiments import direct_logit_attribution

from .conftest import HEADS, Plain, build


def by_weights(plain, ids):
    """Contributions by name, worked out with the weights, and the logit difference."""
    gpt2 = plain.family == "gpt2"
    body = plain.module.transformer if gpt2 else plain.module.model
    norm = body.ln_f if gpt2 else body.norm
    names = [(name, layer) for name in ("attn_out", "mlp_out", "head_z", "neurons") for layer in range(3)]
    with torch.no_grad():
        logits = plain(ids, reads=[*names, ("resid_pre", 0), ("resid_post", 2)])[:, -1]
        stream = plain.values["resid_post", 2][:, -1]
        weight = plain.module.lm_head.weight
        towards = weight[5] - weight[7]
        if gpt2:
            scale = 1 / (stream.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
            added = (towards * norm.bias).sum()
        else:
            scale = 1 / (stream.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
            added = torch.tensor(0.0)

        def part(value):
            value = value - value.mean(-1, keepdim=True) if gpt2 else value
            return (value * scale * norm.weight * towards).sum(-1)

        found = {"embed": part(plain.values["resid_pre", 0][:, -1]), "bias": added.expand(len(ids))}
        heads, neurons = [], []
        for layer in range(3):
            block = plain.layers[layer]
            found[f"attn {layer}"] = part(plain.values["attn_out", layer][:, -1])
            found[f"mlp {layer}"] = part(plain.values["mlp_out", layer][:, -1])
            out = block.attn.c_proj.weight if gpt2 else block.self_attn.o_proj.weight.T
            down = block.mlp.c_proj.weight if gpt2 else block.mlp.down_proj.weight.T
            z = plain.values["head_z", layer][:, -1]
            heads.append(torch.stack([part(z[:, h] @ out.view(HEADS, -1, out.shape[1])[h]) for h in range(HEADS)], -1))
            acts = plain.values["neurons", layer][:, -1]
            neurons.append(torch.stack([part(acts[:, n, None] * down[n]) for n in range(len(down))], -1))
    return found, torch.stack(heads, 1), torch.stack(neurons, 1), logits[:, 5] - logits[:, 7]


def test_components_add_up_to_the_logit_difference(model, plain, pairs):
    expected, _, _, total = by_weights(plain, pairs[0])
    found = direct_logit_attribution(model, pairs[0], 5, 7)
    assert set(found.axes["component"]) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found.select(component=name).values, value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.values.sum(-1), total, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.baseline["logit_diff"], total, rtol=1e-4, atol=1e-4)


def test_heads_and_neurons(model, plain, pairs):
    _, heads, neurons, _ = by_weights(plain, pairs[0])
    found = direct_logit_attribution(model, pairs[0], 5, 7, "head")
    torch.testing.assert_close(found.values, heads, rtol=1e-3, atol=1e-4)
    found = direct_logit_attribution(model, pairs[0], 5, 7, "neuron", layers=[0, 2])
    torch.testing.assert_close(found.values, neurons[:, [0, 2]], rtol=1e-3, atol=1e-4)


def test_one_prompt(model, plain, pairs):
    _, heads, _, _ = by_weights(plain, pairs[0, :1])
    found = direct_logit_attribution(model, pairs[0, 0], [5], [7], "head")
    assert list(found.axes) == ["layer", "head"]
    torch.testing.assert_close(found.values, heads[0], rtol=1e-3, atol=1e-4)


def test_capped_logits_are_refused(ids):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0, pad_token_id=0,
    )  # fmt: skip
    module = Gemma2ForCausalLM(config).eval()
    module.lm_head.weight.data.normal_()
    with pytest.raises(errors.InputError, match="capped"):
        direct_logit_attribution(LanguageModel(module), ids, 5, 7)


def test_weights_that_count_from_one_are_found(ids):
    """A norm whose weight is an offset from one, as Gemma's, gives the right parts."""
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    module = GemmaForCausalLM(config).eval()
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    found = direct_logit_attribution(LanguageModel(module), ids, 5, 7)
    with torch.no_grad():
        logits = module(ids[None]).logits[0, -1]
    torch.testing.assert_close(found.values.sum(), logits[5] - logits[7], rtol=1e-3, atol=1e-3)


def test_an_unknown_unit_is_refused(model, ids):
    with pytest.raises(errors.InputError, match="unit is"):
        direct_logit_attribution(model, ids, 5, 7, "layer")


def test_helper_is_right():
    """The oracle's own parts add up."""
    plain = Plain(build("gpt2"), "gpt2")
    parts, _, _, total = by_weights(plain, torch.arange(6)[None])
    torch.testing.assert_close(sum(parts.values()), total, rtol=1e-3, atol=1e-3)
