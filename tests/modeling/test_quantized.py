"""Weights of eight bits (torchao) on the CPU: the same sites as in the plain model, and the values of the plain call."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.nn import Module

from nnsight import LanguageModel

from . import small

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao's own, when it is imported
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's and transformers' about each other

IDS = torch.tensor([[4, 5, 6, 7], [8, 9, 10, 11]])


def llama() -> Module:
    config = tf.LlamaConfig(**small.TEXT | {"intermediate_size": 64}, num_key_value_heads=2)
    return small.lively(tf.LlamaForCausalLM(config))


def as_it_stands(_: Path) -> LanguageModel:
    net = llama()
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    return LanguageModel(net)


def while_loading(folder: Path) -> LanguageModel:
    llama().save_pretrained(folder)
    config = tf.TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=[])
    return LanguageModel(str(folder), quantization_config=config, device_map="cpu")


@pytest.fixture(params=[as_it_stands, while_loading], ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> LanguageModel:
    found = request.param(tmp_path)
    found.dispatch()
    return found


@pytest.fixture(scope="module")
def plain() -> LanguageModel:
    return LanguageModel(llama())


def paths(model: Any) -> list[str]:
    return [name for name, _ in model._model.named_modules()]


def hooked(net: Any) -> dict[str, Any]:
    seen, handles = {}, []
    for name, module in net.named_modules():
        handles.append(module.register_forward_hook(lambda _m, _a, output, name=name: seen.update({name: output})))
    with torch.no_grad():
        net(IDS)
    for handle in handles:
        handle.remove()
    return seen


def test_the_weights_are_of_eight_bits(model: LanguageModel) -> None:
    weight = model._model.model.layers[0].mlp.down_proj.weight
    assert type(weight) is not torch.nn.Parameter
    assert "int8" in repr(weight).lower()


def test_sites_and_values(model: LanguageModel, plain: LanguageModel) -> None:
    assert paths(model) == paths(plain)
    seen = hooked(model._model)
    with torch.no_grad(), model.trace(IDS):
        down = model.model.layers[0].mlp.down_proj.output.clone()
        hidden = model.model.layers[0].output.clone()
        logits = model.output.logits.save()
    assert torch.equal(down, seen["model.layers.0.mlp.down_proj"])
    assert torch.equal(hidden, seen["model.layers.0"])
    assert torch.equal(logits, seen["lm_head"])
    with torch.no_grad(), plain.trace(IDS):
        near = plain.output.logits.save()
    assert not torch.equal(logits, near)
    torch.testing.assert_close(logits, near, rtol=0.1, atol=0.2)


def test_edits_generations_and_invokes(model: LanguageModel) -> None:
    with torch.no_grad(), model.trace(IDS):
        model.model.layers[0].mlp.output[:] = 0
        edited = model.output.logits.save()
    handle = model._model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, output: output * 0)
    with torch.no_grad():
        assert torch.equal(edited, model._model(IDS).logits)
    handle.remove()

    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    steps = []
    with model.generate(IDS, **options) as tracer:
        for _ in tracer.iter[:]:
            steps.append(model.model.layers[1].output)
        ids = model.generator.output.save()
    assert torch.equal(ids, model._model.generate(IDS, **options))
    assert len(steps) == 3

    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(IDS[:1]):
            model.model.layers[0].output[:] = 0
        with tracer.invoke(IDS[1:]):
            second = model.output.logits.save()
    with torch.no_grad():
        torch.testing.assert_close(second + 0, model._model(IDS[1:]).logits, rtol=1e-4, atol=1e-5)


def test_operations_and_the_vocabulary(model: LanguageModel) -> None:
    mlp = model.model.layers[1].mlp
    with torch.no_grad(), model.trace(IDS, stop_after_last=True):
        given = mlp.source.self_down_proj_0.input.clone()
        product = mlp.source.self_down_proj_0.output.clone()
    with torch.no_grad():
        assert torch.equal(product, model._model.model.layers[1].mlp.down_proj(given))
    with torch.no_grad(), model.trace(IDS):
        pattern = model.heads[0].pattern.clone()
        resid = model.resid_post[1].clone()
    assert torch.allclose(pattern.sum(-1), torch.ones(()))
    torch.testing.assert_close(resid + 0, hooked(model._model)["model.layers.1"], rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_hidden_states(model: LanguageModel) -> None:
    with model.trace(IDS):
        hidden = model.model.layers[0].output
        loss = model.output.logits.sum()
        with loss.backward():
            gradient = hidden.grad.clone()
    assert gradient.abs().sum() > 0
