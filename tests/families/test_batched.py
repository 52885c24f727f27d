"""Every invoke of a batch equals the same prompt traced, edited and generated from alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from nnsight import LanguageModel

_spec = importlib.util.spec_from_file_location("family_models", Path(__file__).parent / "models.py")
assert _spec is not None
assert _spec.loader is not None
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

LENGTHS = (1, 40, 7, 13, 2, 26)
PADS_RIGHT = {name for name in models.BUILDERS if models.FAMILIES[name].kind != "decoder"}
GENERATES = [name for name in models.BUILDERS if models.FAMILIES[name].generates]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, models.VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def own(family: str, value: torch.Tensor, length: int) -> torch.Tensor:
    """The part of a padded row that belongs to the prompt."""
    return value[:, :length] if family in PADS_RIGHT else value[:, value.shape[1] - length :]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", models.BUILDERS)
def test_reads(family: str) -> None:
    net = models.build(family)
    model = LanguageModel(net)
    layers = model.get(models.blocks(family, net))
    hidden, logits = {}, {}
    with model.trace() as tracer:
        for i, prompt in enumerate(prompts()):
            with tracer.invoke(prompt):
                hidden[i] = layers[1].output[0]
                logits[i] = model.output.logits
    for i, prompt in enumerate(prompts()):
        with model.trace(prompt):
            alone = layers[1].output[0]
            answer = model.output.logits
        assert close(own(family, hidden[i], len(prompt)), alone)
        ours = logits[i] if models.FAMILIES[family].kind == "encoder-decoder" else own(family, logits[i], len(prompt))
        assert close(ours, answer)


@pytest.mark.parametrize("family", models.BUILDERS)
def test_edits_stay_in_their_rows(family: str) -> None:
    net = models.build(family)
    model = LanguageModel(net)
    layers = model.get(models.blocks(family, net))
    logits = {}
    with model.trace() as tracer:
        for i, prompt in enumerate(prompts()):
            with tracer.invoke(prompt):
                if i % 3 == 0:
                    layers[0].output[0][:] *= 1.5
                elif i % 3 == 1:
                    layers[1].output = layers[1].output * 0.5
                logits[i] = model.output.logits
    for i, prompt in enumerate(prompts()):
        with model.trace(prompt):
            if i % 3 == 0:
                layers[0].output[0][:] *= 1.5
            elif i % 3 == 1:
                layers[1].output = layers[1].output * 0.5
            answer = model.output.logits
        ours = logits[i] if models.FAMILIES[family].kind == "encoder-decoder" else own(family, logits[i], len(prompt))
        assert close(ours, answer)


@pytest.mark.parametrize("family", GENERATES)
def test_generation(family: str) -> None:
    net = models.build(family)
    model = LanguageModel(net)
    some = prompts()[1:5]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    steps: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(some))}
    tokens = {}
    with model.generate(**options) as tracer:
        for i, prompt in enumerate(some):
            with tracer.invoke(prompt):
                with tracer.iter[:]:
                    steps[i].append(model.lm_head.output[:, -1])
                tokens[i] = model.generator.output
    for i, prompt in enumerate(some):
        alone = []
        with model.generate(prompt, **options) as tracer:
            for _ in tracer.iter[:]:
                alone.append(model.lm_head.output[:, -1])
            answer = model.generator.output
        assert torch.equal(tokens[i][:, -6:], answer[:, -6:])
        assert len(steps[i]) == len(alone) == 6
        assert all(close(a, b) for a, b in zip(steps[i], alone, strict=True))


@pytest.mark.parametrize(("family", "router"), [("mixtral", "model.layers.1.mlp"), ("qwen2_moe", "model.layers.1.mlp")])
def test_tokens_flattened_for_a_router_stay_apart(family: str, router: str) -> None:
    net = models.build(family)
    model = LanguageModel(net)
    gate = model.get(f"{router}.gate")
    seen = {}
    with model.trace() as tracer:
        for i, prompt in enumerate(prompts()):
            with tracer.invoke(prompt):
                seen[i] = gate.input
    for i, prompt in enumerate(prompts()):
        with model.trace(prompt):
            alone = gate.input
        assert close(seen[i][-len(prompt) :], alone)


def test_shared_tables_are_not_cut() -> None:
    net = models.build("llama")
    model = LanguageModel(net)
    tables = {}
    with model.trace() as tracer:
        for i, prompt in enumerate(([5, 6], [7, 8])):
            with tracer.invoke(prompt):
                tables[i] = model.model.rotary_emb.output[0]
    with model.trace([5, 6]):
        alone = model.model.rotary_emb.output[0]
    assert torch.equal(tables[0][:1], alone[:1])
    assert torch.equal(tables[1][:1], alone[:1])
