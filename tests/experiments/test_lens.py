"""Lenses and patchscopes, against the same by hand."""

import pytest
import torch

from nnsight import LanguageModel, errors
from nnsight.experiments import logit_lens, patchscope


def read_stream(plain, stream):
    """The plain model's own norm and head."""
    body = plain.module.transformer if plain.family == "gpt2" else plain.module.model
    norm = body.ln_f if plain.family == "gpt2" else body.norm
    return plain.module.lm_head(norm(stream)).softmax(-1)


def streams(plain, ids, name="resid_post"):
    with torch.no_grad():
        plain(ids, reads=[(name, layer) for layer in range(3)])
    return [plain.values[name, layer] for layer in range(3)]


@pytest.mark.parametrize("name", ["resid_pre", "resid_mid", "resid_post"])
def test_lens(model, plain, pairs, name):
    with torch.no_grad():
        expected = torch.stack([read_stream(plain, stream) for stream in streams(plain, pairs[0], name)], 1)
    best = logit_lens(model, pairs[0], sites=name, progress=False)
    assert list(best.axes) == ["pair", "layer", "pos"]
    torch.testing.assert_close(best.values, expected.max(-1).values, rtol=1e-4, atol=1e-5)
    assert best.texts == tuple(map(str, expected.argmax(-1).flatten().tolist()))
    answer = logit_lens(model, pairs[0], 9, sites=name, progress=False)
    torch.testing.assert_close(answer.values, expected[..., 9], rtol=1e-4, atol=1e-5)


def test_lens_of_the_last_layer_is_the_model(model, plain, ids):
    with torch.no_grad():
        expected = plain(ids[None]).softmax(-1)[0]
    found = logit_lens(model, ids, 9, layers=[2], progress=False)
    torch.testing.assert_close(found.values[0], expected[:, 9], rtol=1e-4, atol=1e-5)


def test_lens_of_different_lengths(model, pairs):
    found = logit_lens(model, [pairs[0, 0], pairs[0, 1, :4]], 9, progress=False)
    alone = logit_lens(model, pairs[0, 1, :4], 9, progress=False)
    torch.testing.assert_close(found.values[1, :, 2:], alone.values, rtol=1e-4, atol=1e-5)
    assert found.values[1, :, :2].isnan().all()


def test_lens_of_capped_logits_is_capped():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0, pad_token_id=0,
    )  # fmt: skip
    module = Gemma2ForCausalLM(config).eval()
    module.lm_head.weight.data.normal_()
    ids = torch.randint(0, 60, (5,))
    with torch.no_grad():
        expected = module(ids[None]).logits.softmax(-1)[0, :, 9]
    found = logit_lens(LanguageModel(module), ids, 9, layers=[1], progress=False)
    torch.testing.assert_close(found.values[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target_layer", [None, 0])
def test_patchscope(model, plain, ids, other_ids, target_layer):
    source = streams(plain, ids[None])
    found = patchscope(model, ids, other_ids[:4], target_pos=-2, target_layer=target_layer, answer=9, progress=False)
    best = patchscope(model, ids, other_ids[:4], target_pos=-2, target_layer=target_layer, progress=False)
    for layer in range(3):
        for pos in range(6):

            def patch(value, layer=layer, pos=pos):
                value = value.clone()
                value[:, 2] = source[layer][:, pos]
                return value

            site = ("resid_post", layer if target_layer is None else target_layer)
            with torch.no_grad():
                expected = plain(other_ids[None, :4], {site: patch})[0, -1].softmax(-1)
            torch.testing.assert_close(found.values[layer, pos], expected[9], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(best.values[layer, pos], expected.max(), rtol=1e-4, atol=1e-5)
            assert best.texts[layer * 6 + pos] == str(int(expected.argmax()))


def test_patchscope_refuses_what_it_cannot_place(model, ids, pairs):
    with pytest.raises(errors.InputError, match="one prompt and one target"):
        patchscope(model, ids, pairs[0], progress=False)
    with pytest.raises(errors.InputError, match="a token at 9"):
        patchscope(model, ids, ids, target_pos=9, progress=False)
