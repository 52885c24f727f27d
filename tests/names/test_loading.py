"""Models whose weights come later, adapters, and weights that are not plain numbers."""

import pytest
import torch

from nnsight import LanguageModel
from nnsight.errors import NamesError

from .cases import BY_NAME, build, close

IDS = torch.tensor([[5, 6, 7, 8]])


def test_before_and_after_the_weights_are_loaded() -> None:
    model = LanguageModel("nnsight/landmarks")
    blocks, norm = model.layers, model.final_norm
    attention = model.layers[3].attn
    assert not model.dispatched
    with pytest.raises(NamesError, match="not loaded yet"):
        model.names.check()
    with model.scan("The Eiffel Tower is in"):
        shape = model.heads[2].result.shape
    assert not model.dispatched
    with model.trace("The Eiffel Tower is in"):
        attended = attention.output[0]
        assert torch.equal(attended, model.attn_out[3])
        result = model.heads[4].result
        last = blocks[-1].output[0]
        assert torch.equal(norm.input, last)
    assert result.shape == shape
    assert model.layers is model.transformer.h


def test_what_was_promised_without_weights_is_checked_with_them(monkeypatch) -> None:
    from dataclasses import replace

    from nnsight.names import _families, _registry

    monkeypatch.setattr(_registry, "_own", {"gpt2": replace(_families.GPT2, final_norm="h.0.ln_1")})
    model = LanguageModel("nnsight/landmarks")
    norm = model.final_norm
    with pytest.raises(NamesError, match=r"model\.final_norm is not served"), model.trace("Hello"):
        norm.output


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    net = build(BY_NAME["llama"])
    targets = ["q_proj", "o_proj", "down_proj"]
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    model = LanguageModel(peft.get_peft_model(net, config).eval())
    model.names.check()
    assert model.layers[1].attn.path == "model.base_model.model.model.layers.1.self_attn"
    with model.trace(IDS):
        z, result, attended = model.heads[1].z, model.heads[1].result, model.attn_out[1]
        bias = model.layers[1].attn.o_proj.base_layer._module.bias
        assert close(result.sum(-2) + bias, attended)
    outputs = []
    for edited in ("z", "result"):
        with model.trace(IDS):
            getattr(model.heads[1], edited)[:, :, 2] = 0
            outputs.append(model.logits.clone())
    assert close(*outputs)
    assert z.shape == (1, 4, 4, 8)


def test_half_precision() -> None:
    model = LanguageModel(build(BY_NAME["llama"]).to(torch.bfloat16))
    model.names.check()
    with model.trace(IDS):
        pattern = model.heads[1].pattern
        assert pattern.dtype == torch.bfloat16
        model.heads[1].z[:, :, 1] = 0
        result = model.heads[1].result
        assert not result[:, :, 1].any()
