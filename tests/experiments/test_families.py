"""Sweeps on models of every architecture, against loops of traces that run from the start to the end."""

import pytest
import torch
import zoo

from nnsight import LanguageModel, errors
from nnsight.experiments import activation_patching, direct_logit_attribution, log_prob

CAUSAL = [name for name, family in zoo.FAMILIES.items() if "CausalLM" in type(family.make()).__name__ or name == "gpt2"]
SITES = ["resid_pre", "resid_post", "mlp_out"]


def prepare(name, length=5):
    torch.manual_seed(0)
    module = zoo.FAMILIES[name].make().eval()
    ids = torch.randint(5, 60, (2, length), generator=torch.Generator().manual_seed(1))
    return LanguageModel(module), ids


def by_traces(model, base, source, name, layers, dim=1, count=None):
    """The metric with each place of this dimension patched alone, by default each position."""
    count = len(base) if count is None else count
    found = torch.zeros(len(layers), count)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            site = model.site(name, layer)
            with model.trace(source[None], use_cache=False):
                value = site.read().clone().save()
            for place in range(count):
                with model.trace(base[None], use_cache=False):
                    live = site.read().clone()
                    live.select(dim, place).copy_(value.select(dim, place))
                    site.write(live)
                    logits = model.output.logits.save()
                found[i, place] = logits[0, -1].float().log_softmax(-1)[9]
    return found


@pytest.mark.parametrize("name", CAUSAL)
def test_sweep_is_a_loop_of_traces(name):
    model, (clean, corrupted) = prepare(name)
    compared = 0
    for site in SITES:
        try:
            found = activation_patching(model, clean, corrupted, log_prob(9), site, progress=False)
        except errors.NamesError:
            continue  # a family without this value, which says so
        expected = by_traces(model, corrupted, clean, site, found.axes["layer"])
        torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)
        compared += 1
    assert compared


@pytest.mark.parametrize("name", CAUSAL)
def test_sweep_over_heads_is_a_loop_of_traces(name):
    model, (clean, corrupted) = prepare(name, length=24)  # so long that the rows of each layer join those before
    try:
        found = activation_patching(model, clean, corrupted, log_prob(9), "head_z", ("layer", "head"), progress=False)
    except errors.NamesError as error:
        pytest.skip(f"no heads: {error}")
    layers, heads = found.axes["layer"], len(found.axes["head"])
    expected = by_traces(model, corrupted, clean, "head_z", layers, dim=2, count=heads)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_parts_add_up_or_are_refused(name):
    model, (ids, _) = prepare(name)
    try:
        parts = direct_logit_attribution(model, ids, 9, 7)
    except (errors.InputError, errors.NamesError):
        return
    with torch.no_grad():
        logits = model._model(ids[None], use_cache=False).logits[0, -1]
    torch.testing.assert_close(parts.values.sum(), (logits[9] - logits[7]).float(), rtol=1e-3, atol=1e-3)
