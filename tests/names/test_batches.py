"""Each invoke reads and writes its own rows of every value, as if its prompt were traced alone; gradients included."""

import pytest
import torch
import zoo

from nnsight import LanguageModel

from .cases import BY_NAME, CASES, FAMILIES, Case, build, close

PROMPTS = zoo.prompts((9, 4, 6))
TEXT = [case for case in CASES if FAMILIES[case.family].takes_text]
VALUES = ("resid_pre", "attn_out", "mixer_out", "resid_mid", "cross_out", "neurons", "mlp_out", "resid_post")
HEADS = ("q", "k", "v", "q_rot", "k_rot", "pattern", "z", "result")
LAYER = 1


def names_of(case: Case, model: LanguageModel) -> list[str]:
    """The names of values that the layer has, in order."""
    stack, found = model.names.stacks[case.stack], []
    for name in stack.names():
        try:
            model.site(name, LAYER, stack=case.stack)
        except AttributeError:
            continue
        found.append(name)
    return found


def own(case: Case, site, value: torch.Tensor, length: int) -> torch.Tensor:
    """The part of a padded row's value that belongs to the prompt."""
    decoded = case.stack == "decoder"
    for dim, axis in enumerate(site.axes):
        of_encoder = axis == "key" or (axis == "pos" and site.name in ("cross_head_k", "cross_head_v"))
        cross = site.name.startswith("cross_head")
        if axis not in ("pos", "query", "key") or (decoded and not (cross and of_encoder)):
            continue
        size = value.shape[dim]
        start = 0 if FAMILIES[case.family].kind != "decoder" else size - length
        value = value.narrow(dim, start, length)
    return value


def read(site):
    return site.read().clone()


@pytest.mark.parametrize("case", TEXT, ids=lambda case: case.name)
def test_reads(case: Case) -> None:
    model = LanguageModel(build(case))
    sites = [model.site(name, LAYER, stack=case.stack) for name in names_of(case, model)]
    found: list[list[torch.Tensor]] = []
    with model.trace(strict_order=True) as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                found.append([site.read().clone() for site in sites])
    for prompt, values in zip(PROMPTS, found, strict=True):
        with model.trace(prompt, strict_order=True):
            alone = [site.read().clone() for site in sites]
        for site, value, expected in zip(sites, values, alone, strict=True):
            assert value.shape[0] == 1
            assert close(own(case, site, value, len(prompt)), own(case, site, expected, len(prompt))), site


def change(site, prompt_number: int) -> None:
    """An edit, different for each prompt: in place, by assignment, none."""
    if prompt_number == 0:
        site.read()[:] *= 1.5
    elif prompt_number == 1:
        site.write(site.read() * 0.5)


@pytest.mark.parametrize("case", TEXT, ids=lambda case: case.name)
def test_writes(case: Case) -> None:
    model = LanguageModel(build(case))
    for name in names_of(case, model):
        site = model.site(name, LAYER, stack=case.stack)
        found = []
        with torch.no_grad(), model.trace() as tracer:
            for i, prompt in enumerate(PROMPTS):
                with tracer.invoke(prompt):
                    change(site, i)
                    found.append(model.output[0].clone())
        for i, prompt in enumerate(PROMPTS):
            with torch.no_grad(), model.trace(prompt):
                change(site, i)
                alone = model.output[0].clone()
            ours = found[i]
            if case.stack == "":
                start = 0 if FAMILIES[case.family].kind == "encoder" else ours.shape[1] - len(prompt)
                ours = ours[:, start : start + len(prompt)]
            assert close(ours, alone), site


@pytest.mark.parametrize("case", [c for c in TEXT if c.stack == ""], ids=lambda case: case.name)
def test_gradients(case: Case) -> None:
    model = LanguageModel(build(case))
    names = [name for name in names_of(case, model) if name not in ("head_q_rot", "head_k_rot")]
    sites = [model.site(name, LAYER) for name in names]
    prompts = PROMPTS[:2]
    found = []
    losses = []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                found.append([site.read() for site in sites])
                logits = own(case, model.site("logits"), model.logits, len(prompt))
                losses.append((logits**2).sum())
    for prompt, values, loss in zip(prompts, found, losses, strict=True):
        ours = torch.autograd.grad(loss, values, retain_graph=True)
        with model.trace(prompt):
            alone = [site.read() for site in sites]
            total = (model.logits**2).sum()
        expected = torch.autograd.grad(total, alone)
        for site, one, other in zip(sites, ours, expected, strict=True):
            assert other.abs().max() > 0, site
            assert close(own(case, site, one, len(prompt)), other, 1e-3), site


def test_gradients_of_a_stream_between_two_blocks_reach_it_by_both_ways() -> None:
    model = LanguageModel(build(BY_NAME["llama"]))
    found, losses = {}, {}
    with model.trace() as tracer:
        for i, prompt in enumerate(PROMPTS[:2]):
            with tracer.invoke(prompt):
                found[i] = model.resid_mid[1]
                losses[i] = model.resid_post[1].sum()
    (ours,) = torch.autograd.grad(losses[0], found[0], retain_graph=True)
    with model.trace(PROMPTS[0]):
        mid = model.resid_mid[1]
        loss = model.resid_post[1].sum()
    (expected,) = torch.autograd.grad(loss, mid)
    assert close(ours[:, -9:], expected)
    assert not close(expected, torch.ones_like(expected))  # which the way around the MLP alone would give
