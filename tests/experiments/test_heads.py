"""Kinds of heads, against patterns of the plain model and against heads made by hand."""

import pytest
import torch

from nnsight import LanguageModel, errors
from nnsight.experiments import detect_heads

from .conftest import VOCAB, build


@pytest.mark.parametrize(("kind", "back"), [("induction", 9), ("previous_token", 1), ("duplicate_token", 10)])
def test_scores_are_averages_of_the_plain_patterns(model, family, kind, back):
    found = detect_heads(model, kind, length=10, prompts=5, seed=3)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.stack([torch.randperm(VOCAB, generator=generator)[:10] for _ in range(5)])
    eager = build(family)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = eager(torch.cat([drawn, drawn], 1), output_attentions=True).attentions
    queries = range(1 if kind == "previous_token" else 10, 20)
    for layer, pattern in enumerate(patterns):
        expected = torch.stack([pattern[:, :, q, q - back] for q in queries]).mean((0, 1))
        torch.testing.assert_close(found.values[layer], expected, rtol=1e-4, atol=1e-5)
    assert found.baseline["uniform"] == pytest.approx(sum(1 / (q + 1) for q in queries) / len(queries))


def test_a_previous_token_head_made_by_hand_is_found():
    module = build("gpt2")
    block = module.transformer.h[1].attn
    weight, bias = block.c_attn.weight.data, block.c_attn.bias.data
    positions = module.transformer.wpe.weight.data
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(32, 32)).Q  # one for each position
    positions.copy_(40 * directions)
    for other in module.transformer.h[:1]:
        other.attn.c_proj.weight.data.zero_()
        other.mlp.c_proj.weight.data.zero_()
    # Head 2 has eight dimensions: queries say their own position, keys the next one, both as a code.
    code = 2 * torch.nn.functional.normalize(torch.randn(33, 8), dim=-1)
    weight[:, 16:24] = directions.T @ code[:32]
    weight[:, 32 + 16 : 32 + 24] = directions.T @ code[1:]
    bias.zero_()
    scores = detect_heads(LanguageModel(module), "previous_token", length=10)
    assert scores.best() == {"layer": 1, "head": 2}
    assert scores.select(layer=1, head=2).values > 0.9
    assert detect_heads(LanguageModel(module), "duplicate_token", length=10).select(layer=1, head=2).values < 0.1


def test_what_is_no_kind_is_refused(model):
    with pytest.raises(errors.InputError, match="kind is one of"):
        detect_heads(model, "copying")
    with pytest.raises(errors.InputError, match="is more"):
        detect_heads(model, length=100)
