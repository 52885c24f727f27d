"""Mixtures of experts: routers and experts by name, and no invoke sees another's tokens in them."""

import pytest
import torch
import zoo

from nnsight import LanguageModel

from .cases import BY_NAME, build, close

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba"]
PROMPTS = zoo.prompts((11, 5, 1, 8))


@pytest.fixture(params=MIXTURES)
def model(request):
    return LanguageModel(build(BY_NAME[request.param]))


def values(model):
    """What router and experts of layer 1 are given and give, each a tensor of `[tokens, ...]`."""
    mlp = model.layers[1].mlp
    given = mlp.router.input
    routed = mlp.router.output
    experts = mlp.experts.inputs[0]
    found = [given.flatten(0, -2), *(item for item in routed if isinstance(item, torch.Tensor))]
    found += [item for item in experts if isinstance(item, torch.Tensor)]
    found.append(mlp.experts.output)
    return [value.clone() for value in found]


def test_reads(model) -> None:
    found = []
    with model.trace(strict_order=True) as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                found.append(values(model))
    for prompt, ours in zip(PROMPTS, found, strict=True):
        with model.trace(prompt, strict_order=True):
            alone = values(model)
        assert len(ours) == len(alone) >= 5
        for one, other in zip(ours, alone, strict=True):
            assert one.shape[0] == 11  # the prompt's own tokens, padded
            assert close(one[-len(prompt) :].double(), other.double())


def test_writes(model) -> None:
    """One prompt's tokens all go to one expert, another's get nothing from theirs."""

    def edit(i):
        mlp = model.layers[1].mlp
        if i == 0:
            scores, weights, chosen = mlp.router.output
            mlp.router.output = (scores, weights, torch.zeros_like(chosen))
        elif i == 1:
            mlp.experts.output[:] = 0
        elif i == 2:
            mlp.experts.output = mlp.experts.output * 3

    found = []
    with torch.no_grad(), model.trace() as tracer:
        for i, prompt in enumerate(PROMPTS):
            with tracer.invoke(prompt):
                edit(i)
                found.append(model.resid_post[1][:, -1].clone())
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad(), model.trace(prompt):
            edit(i)
            assert close(found[i], model.resid_post[1][:, -1]), i


def test_paths() -> None:
    expected = {
        "mixtral": ("gate", "experts"),
        "gpt_oss": ("router", "experts"),
        "jamba": ("router", "experts"),
    }
    for name, (router, experts) in expected.items():
        mlp = LanguageModel(build(BY_NAME[name])).layers[1].mlp
        assert mlp.router.path == f"{mlp.path}.{router}"
        assert mlp.experts.path == f"{mlp.path}.{experts}"
