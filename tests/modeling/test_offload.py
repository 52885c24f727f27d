"""Models whose weights lie elsewhere between calls (accelerate): the same values and edits as of the plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as tf
from torch.nn import Module

from nnsight import LanguageModel, NNsight

from . import small

IDS = [[4, 5, 6, 7], [8, 9, 10, 11]]
OPTIONS = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def llama(**more: Any) -> Module:
    return small.lively(tf.LlamaForCausalLM(tf.LlamaConfig(**small.TEXT, num_key_value_heads=2, **more)))


def gpt2() -> Module:
    return small.lively(
        tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=30, bos_token_id=1, eos_token_id=2))
    )


def saved(net: Module, folder: Path) -> str:
    net.save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


def on_disk(net: Module, folder: Path) -> LanguageModel:
    """Its second layer lies on the disk."""
    found = {name.rpartition(".")[0]: "cpu" for name, _ in net.named_parameters()}
    found = {name: "disk" if ".1." in name else "cpu" for name in found} | {"lm_head": "cpu"}
    buffers = {name: "cpu" for name, module in net.named_modules() if module._buffers and name not in found}
    return load(net, folder, device_map={**found, **buffers}, offload_folder=str(folder / "offload"))


def automatic(net: Module, folder: Path) -> LanguageModel:
    """`device_map="auto"`, with too little memory for all."""
    size = sum(parameter.numel() * 4 for parameter in net.parameters())
    options = {"max_memory": {"cpu": int(size * 0.75)}, "offload_folder": str(folder / "offload")}
    return load(net, folder, device_map="auto", **options)


def in_memory(net: Module, folder: Path) -> LanguageModel:
    """All weights lie in memory, and are copied for each call."""
    twin = type(net)(net.config).eval()
    return LanguageModel(accelerate.cpu_offload(twin, execution_device="cpu", state_dict=net.state_dict()))


def load(net: Module, folder: Path, **options: Any) -> LanguageModel:
    model = LanguageModel(saved(net, folder), **options)
    model.dispatch()
    return model


@pytest.fixture(params=[on_disk, automatic, in_memory], ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[[Module, Path], LanguageModel]:
    return request.param


@pytest.fixture(params=[llama, gpt2], ids=lambda make: make.__name__)
def pair(request: pytest.FixtureRequest, make: Any, tmp_path: Path) -> tuple[LanguageModel, LanguageModel]:
    """A plain model, and the same one with weights elsewhere."""
    net = request.param()
    plain, offloaded = LanguageModel(net), make(net, tmp_path)
    hooks = [getattr(module, "_hf_hook", None) for module in offloaded._model.modules()]
    assert any(offloads(hook) for hook in hooks)
    return plain, offloaded


def offloads(hook: Any) -> bool:
    return any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ())))


def blocks(model: LanguageModel) -> Any:
    return model.model.layers if hasattr(model._model, "model") else model.transformer.h


def same(one: Any, other: Any) -> bool:
    return torch.equal(one + 0, other + 0)


def test_values(pair: tuple[LanguageModel, LanguageModel]) -> None:
    found = []
    for model in pair:
        with torch.no_grad(), model.trace(IDS):
            inputs = blocks(model)[1].input.clone()
            inner = blocks(model)[1].mlp.output.clone()
            hidden = blocks(model)[1].output.clone()
            logits = model.output.logits.save()
        found.append([inputs, inner, hidden, logits])
    assert all(same(one, other) for one, other in zip(*found, strict=True))
    assert same(found[0][3], pair[0]._model(torch.tensor(IDS)).logits)


def test_edits(pair: tuple[LanguageModel, LanguageModel]) -> None:
    found = []
    for model in pair:
        with torch.no_grad(), model.trace(IDS):
            blocks(model)[0].output[0][:, 1] = 0
            blocks(model)[1].mlp.output = blocks(model)[1].mlp.output * 2
            edited = model.output.logits.save()
        with torch.no_grad(), model.trace(IDS):
            blocks(model)[1].skip(blocks(model)[0].output)
            skipped = model.output.logits.save()
        found.append([edited, skipped])
    assert all(same(one, other) for one, other in zip(*found, strict=True))
    assert not same(found[0][0], found[0][1])


def test_operations_of_a_source(pair: tuple[LanguageModel, LanguageModel]) -> None:
    found = []
    for model in pair:
        mlp = blocks(model)[1].mlp
        name = "self_down_proj_0" if hasattr(model._model, "model") else "self_c_proj_0"
        with torch.no_grad(), model.trace(IDS):
            operation = getattr(mlp.source, name)
            given = operation.input.clone()
            operation.output = operation.output * 3
            logits = model.output.logits.save()
        assert name in str(mlp.source)
        found.append([given, logits])
    assert all(same(one, other) for one, other in zip(*found, strict=True))


def test_invokes(pair: tuple[LanguageModel, LanguageModel]) -> None:
    found = []
    for model in pair:
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(IDS[:1]):
                donor = blocks(model)[1].output
            with tracer.invoke(IDS[1:]):
                blocks(model)[1].output[0][:, -1] = donor[:, -1] if donor.dim() == 3 else donor[-1]
                logits = model.output.logits.save()
        found.append(logits)
    assert same(*found)


def test_generation(pair: tuple[LanguageModel, LanguageModel]) -> None:
    found = []
    for model in pair:
        steps = []
        with model.generate(IDS, **OPTIONS) as tracer:
            for _ in tracer.iter[:]:
                steps.append(blocks(model)[1].output.clone())
            ids = model.generator.output.save()
        found.append([*steps, ids])
    assert len(found[0]) == 4
    assert all(same(one, other) for one, other in zip(*found, strict=True))


def test_the_vocabulary_and_caches(pair: tuple[LanguageModel, LanguageModel]) -> None:
    found = []
    for model in pair:
        with torch.no_grad(), model.trace(IDS) as tracer:
            cache = tracer.cache(modules=[blocks(model)[1]])
            pattern = model.heads[1].pattern.clone()
            z = model.heads[1].z.clone()
            resid = model.resid_post[1].clone()
        assert same(cache[blocks(model)[1]].output, resid)
        found.append([pattern, z, resid])
    assert all(same(one, other) for one, other in zip(*found, strict=True))


def test_early_stops_and_second_passes(pair: tuple[LanguageModel, LanguageModel]) -> None:
    found = []
    for model in pair:
        with torch.no_grad(), model.trace(IDS, stop_after_last=True):
            last = blocks(model)[1].mlp.output.clone()
            with pytest.warns(match="second"):
                first = blocks(model)[0].mlp.output.clone()
        found.append([last, first])
    assert all(same(one, other) for one, other in zip(*found, strict=True))


def test_shapes_without_weights(pair: tuple[LanguageModel, LanguageModel]) -> None:
    for model in pair:
        with model.scan(IDS):
            shape = blocks(model)[1].mlp.output.shape
        assert shape == (2, 4, 32)


def test_the_hooks_stay(pair: tuple[LanguageModel, LanguageModel]) -> None:
    _, model = pair
    net = model._model
    before = [{name: id(value) for name, value in vars(m).items()} for m in net.modules()]
    with torch.no_grad():
        expected = net(torch.tensor(IDS)).logits
        with model.trace(IDS):
            blocks(model)[1].mlp.output
        with pytest.raises(ZeroDivisionError):
            with model.trace(IDS):
                blocks(model)[1].mlp.output
                1 / 0
        assert [{name: id(value) for name, value in vars(m).items()} for m in net.modules()] == before
        assert torch.equal(net(torch.tensor(IDS)).logits, expected)
    away = [p for p in net.parameters() if p.is_meta]
    assert away  # also after an error in the middle of a module whose weights were fetched


def test_a_module_with_hooks_is_wrapped_as_it_stands() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x = torch.rand(3, 4)
    expected, hidden = net(x), net[0](x)
    accelerate.cpu_offload(net, execution_device="cpu")
    model = NNsight(net)
    with model.scan(x):
        assert model[2].output.shape == (3, 2)
    with model.trace(x):
        first = model[0].output.save()
        model[1].output = model[1].output * 1
        output = model.output.save()
    assert torch.equal(first, hidden)
    assert torch.equal(output, expected)


def test_a_stop_where_weights_are_fetched(tmp_path: Path) -> None:
    plain, model = LanguageModel(gpt2()), on_disk(gpt2(), tmp_path)
    leaf = model.transformer.h[1].mlp.c_fc
    for _ in range(2):
        with torch.no_grad(), model.trace(IDS) as tracer:
            leaf.source.torch_addmm_0.output
            tracer.stop()
    with torch.no_grad():
        assert same(model._model(torch.tensor(IDS)).logits, plain._model(torch.tensor(IDS)).logits)
        with model.trace(IDS):
            logits = model.output.logits.save()
            with pytest.warns(match="second"):
                early = leaf.output.clone()
        with plain.trace(IDS):
            expected = plain.transformer.h[1].mlp.c_fc.output.clone()
    assert same(logits, plain._model(torch.tensor(IDS)).logits)
    assert same(early, expected)
