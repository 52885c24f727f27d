"""Adapters of PEFT: loaded with a model or wrapped with it, seen from inside, merged and taken out again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from nnsight import LanguageModel, NNsight, TransformersModel
from nnsight.errors import InputError, LoadError, NeverRanError

from . import small

# PEFT asks transformers for a property by its older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = torch.tensor([[4, 5, 6, 7], [8, 9, 10, 11]])


class Files:
    """A model's folder, an adapter's, and the plain modules that were saved there."""

    def __init__(self, folder: Path) -> None:
        self.base, self.adapter = str(folder / "base"), str(folder / "adapter")
        config = tf.LlamaConfig(**small.TEXT, num_key_value_heads=2)
        self.plain = small.lively(tf.LlamaForCausalLM(config))
        self.plain.save_pretrained(self.base)
        small.tokenizer().save_pretrained(self.base)
        lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
        lora.base_model_name_or_path = self.base
        own = tf.LlamaForCausalLM.from_pretrained(self.base)
        self.adapted = peft.get_peft_model(own, lora)
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in self.adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        self.adapted.eval().save_pretrained(self.adapter)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("adapters"))


def by_adapter(files: Files) -> LanguageModel:
    return LanguageModel(files.adapter)


def by_option(files: Files) -> LanguageModel:
    return LanguageModel(files.base, peft=files.adapter)


def as_it_stands(files: Files) -> LanguageModel:
    return LanguageModel(peft.PeftModel.from_pretrained(tf.LlamaForCausalLM.from_pretrained(files.base), files.adapter))


MAKES = [by_adapter, by_option, as_it_stands]


@pytest.fixture(params=MAKES, ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest, files: Files) -> LanguageModel:
    return request.param(files)


def layers(model: Any) -> Any:
    return model.base_model.model.model.layers if isinstance(model._model, peft.PeftModel) else model.model.layers


def plain_logits(net: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return net(IDS, **options).logits


def test_values_are_those_of_the_adapted_model(model: LanguageModel, files: Files) -> None:
    with torch.no_grad(), model.trace(IDS):
        logits = model.output.logits.save()
    assert torch.equal(logits, plain_logits(files.adapted))
    assert not torch.allclose(logits, plain_logits(files.plain))


def test_the_inside_of_an_adapter(model: LanguageModel, files: Files) -> None:
    inner = files.adapted.get_base_model().model.layers[1].mlp.down_proj
    down = layers(model)[1].mlp.down_proj
    with torch.no_grad(), model.trace(IDS):
        given = down.input.clone()
        low = down.lora_A.default.output.clone()
        high = down.lora_B.default.output.clone()
        whole = down.output.clone()
    with torch.no_grad():
        assert torch.equal(low, inner.lora_A["default"](given))
        assert torch.equal(high, inner.lora_B["default"](low))
        assert torch.equal(whole, inner.base_layer(given) + high * inner.scaling["default"])


def test_without_its_adapters_it_is_the_base_model(model: LanguageModel, files: Files) -> None:
    with torch.no_grad(), model.trace(IDS):
        for layer in layers(model):
            layer.self_attn.q_proj.lora_B.default.output[:] = 0
            layer.mlp.down_proj.lora_B.default.output = layer.mlp.down_proj.lora_B.default.output * 0
        logits = model.output.logits.save()
    assert torch.equal(logits, plain_logits(files.plain))


def test_paths_are_there_before_the_weights(files: Files) -> None:
    for make in (by_adapter, by_option):
        model = make(files)
        low = model.model.layers[0].self_attn.q_proj.lora_A.default
        assert not model.dispatched
        assert low._module.weight.is_meta
        with model.scan(IDS):
            assert low.output.shape == (2, 4, 2)
        assert not model.dispatched
        paths = [name for name, _ in model._model.named_modules()]
        with torch.no_grad(), model.trace(IDS):
            found = low.output.clone()
        assert found.abs().sum() > 0
        assert [name for name, _ in model._model.named_modules()] == paths


def test_operations_of_an_adapted_layer(model: LanguageModel) -> None:
    down = layers(model)[1].mlp.down_proj
    with torch.no_grad(), model.trace(IDS):
        base = down.source.self_base_layer_2.output.clone()  # the branch without merged or disabled adapters
    with torch.no_grad(), model.trace(IDS):
        again = down.base_layer.output.clone()
    assert torch.equal(base, again)


def test_merging_and_back(model: LanguageModel, files: Files) -> None:
    expected = plain_logits(files.adapted)
    assert model.merge_adapter() is model
    with torch.no_grad(), model.trace(IDS):
        merged = model.output.logits.save()
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(NeverRanError, match="lora_A"):
        with model.trace(IDS):
            layers(model)[0].self_attn.q_proj.lora_A.default.output
    assert model.merge_adapter().unmerge_adapter() is model
    with torch.no_grad(), model.trace(IDS):
        low = layers(model)[0].self_attn.q_proj.lora_A.default.output.clone()
        again = model.output.logits.save()
    assert low.shape == (2, 4, 2)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


def test_texts_generations_and_the_vocabulary(model: LanguageModel, files: Files) -> None:
    model.tokenizer = small.tokenizer()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    steps = []
    with model.generate(IDS, **options) as tracer:
        for _ in tracer.iter[:]:
            steps.append(layers(model)[0].mlp.down_proj.lora_A.default.output.clone())
        ids = model.generator.output.save()
    assert torch.equal(ids, files.adapted.generate(IDS, **options))
    assert [step.shape[1] for step in steps] == [4, 1, 1]
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke("a red cat"):
            first = model.output.logits
        with tracer.invoke("the tower is in the"):
            hidden = model.mlp_out[1].save()
    with torch.no_grad(), model.trace("a red cat"):
        alone = model.output.logits.save()
    torch.testing.assert_close(first[:, -3:] + 0, alone + 0, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), model.trace("the tower is in the"):
        own, mine = layers(model)[1].mlp.down_proj.output.save(), model.mlp_out[1].save()
    torch.testing.assert_close(mine, own)
    torch.testing.assert_close(hidden, own, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_adapters(model: LanguageModel) -> None:
    net = model.dispatch()._model
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with model.trace(IDS):
        high = layers(model)[1].mlp.down_proj.lora_B.default.output
        loss = model.output.logits.logsumexp(-1).sum()
        with loss.backward():
            gradient = high.grad.clone()
    assert gradient.abs().sum() > 0
    found = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert found
    assert all("lora_" in name for name in found)


def test_any_class_takes_one(files: Files) -> None:
    wrapped = NNsight(files.adapted)
    with torch.no_grad(), wrapped.trace(input_ids=IDS):
        logits = wrapped.output.logits.save()
    assert torch.equal(logits, plain_logits(files.adapted))

    net = peft.get_peft_model(small.bert(), peft.LoraConfig(r=2, target_modules=["query"])).eval()
    model = TransformersModel(net, processor=small.tokenizer())
    with torch.no_grad(), model.trace("a red cat"):
        low = model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A.default.output.save()
        answer = model.output.logits.save()
    assert low.shape[-1] == 2
    with torch.no_grad():
        assert torch.equal(answer, net(**small.tokenizer()("a red cat", return_tensors="pt")).logits)


@pytest.mark.parametrize("make", [by_adapter, by_option], ids=lambda make: make.__name__)
def test_from_the_hubs_cache(files: Files, make: Callable[..., Any], hub_cache: Path) -> None:
    repository = hub_cache / "models--someone--adapter"
    snapshot = repository / "snapshots" / ("1" * 40)
    if not snapshot.exists():
        snapshot.mkdir(parents=True)
        for file in Path(files.adapter).iterdir():
            (snapshot / file.name).symlink_to(file)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("1" * 40)
    model = (
        LanguageModel("someone/adapter") if make is by_adapter else LanguageModel(files.base, peft="someone/adapter")
    )
    with torch.no_grad(), model.trace(IDS):
        logits = model.output.logits.save()
    assert torch.equal(logits, plain_logits(files.adapted))


# --- errors ---------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_not_there(files: Files, tmp_path: Path) -> None:
    for name in (str(tmp_path / "nothing"), "someone/nothing"):
        with pytest.raises(LoadError, match=r"adapter_config\.json"):
            LanguageModel(files.base, peft=name)
    with pytest.raises(LoadError, match="no such folder"):
        LanguageModel(str(tmp_path / "nothing"))


def test_an_adapter_for_another_model(files: Files, tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"])
    lora.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="does not fit"):
        LanguageModel(files.base, peft=str(tmp_path))


def test_merging_without_an_adapter(files: Files) -> None:
    for change in ("merge_adapter", "unmerge_adapter"):
        with pytest.raises(InputError, match="peft="):
            getattr(LanguageModel(files.base), change)()


def test_a_module_and_an_adapters_name(files: Files) -> None:
    with pytest.raises(InputError, match=r"PeftModel\.from_pretrained"):
        LanguageModel(files.plain, peft=files.adapter)


def test_an_adapter_without_some_of_its_weights(files: Files, tmp_path: Path) -> None:
    shutil.copytree(files.adapter, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1." not in name}
    save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(LoadError, match=r"no weights for .*layers\.1"):
        LanguageModel(str(tmp_path / "adapter"), dispatch=True)
