"""Interventions as data, and caches: here, on a server in this process, and confined on a server."""

from __future__ import annotations

import pytest
import torch

from nnsight import LanguageModel, NNsight
from nnsight.errors import InputError, NeverRanError, RowsError, UnknownPathError
from nnsight.experiments import Intervention, InterventionSpec, steer

PROMPT = "The Eiffel Tower is in the city of"
OTHER = "The Colosseum is in the city of"
WIDTH = 128
DIRECTION = torch.linspace(-1, 1, WIDTH)

SPECS = {
    "add": InterventionSpec(Intervention("resid_post[4]", "add", value=DIRECTION, factor=0.5, positions=[-1])),
    "swap": InterventionSpec(
        Intervention("resid_post[4]", "swap", prompt=OTHER, positions=[-1]), Intervention("mlp_out[2]", "zero")
    ),
    "by path": InterventionSpec(Intervention("transformer.h.3.mlp", "scale", factor=0.0)),
    "heads": InterventionSpec(Intervention("head_z[1]", "zero", heads=[0, 2])),
}


@pytest.fixture(autouse=True)
def nothing_is_loaded(model, where):
    yield
    if where:
        assert not model.dispatched


def logits_of(model, where):
    with torch.no_grad(), model.trace(PROMPT, **where):
        logits = model.logits.save()
    return logits


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_that_is_applied(model, where, gpt2, name):
    with model.apply(SPECS[name]):
        found = logits_of(model, where)
    with gpt2.apply(SPECS[name]):
        expected = logits_of(gpt2, {})
    plain = logits_of(gpt2, {})
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert torch.equal(logits_of(model, where), plain)


def test_a_spec_that_is_stored(model, where, gpt2):
    edited = model.edit(SPECS["swap"])
    with edited.generate(PROMPT, max_new_tokens=3, **where) as tracer:
        found = tracer.result.save()
    with gpt2.edit(SPECS["swap"]).generate(PROMPT, max_new_tokens=3) as tracer:
        expected = tracer.result.save()
    assert torch.equal(found, expected)


def test_specs_and_blocks_act_in_their_order(model, where, gpt2):
    def with_both(model):
        first = model.edit(SPECS["add"])
        with first.edit() as both:
            first.transformer.h[4].output[0][:] *= 2
        return both.edit(SPECS["by path"])

    assert torch.equal(logits_of(with_both(model), where), logits_of(with_both(gpt2), {}))


def test_a_trained_vector_gets_its_gradient(model, where, gpt2):
    def gradient(model, where):
        value = (DIRECTION / 10).clone().requires_grad_()
        spec = InterventionSpec(Intervention("resid_post[4]", "trained", value=value, factor=2.0))
        with model.apply(spec), model.trace(PROMPT, **where):
            model.logits[0, -1].logsumexp(-1).backward()
        gpt2._model.zero_grad(set_to_none=True)
        return value.grad

    expected = gradient(gpt2, {})
    assert expected.norm() > 0
    torch.testing.assert_close(gradient(model, where), expected)


def test_steering(model, where, gpt2):
    with steer(model, DIRECTION, -2, strength=3.0) as steered:
        found = logits_of(steered, where)
    with steer(gpt2, DIRECTION, -2, strength=3.0) as steered:
        assert torch.equal(found, logits_of(steered, {}))


def test_a_spec_is_used_inside_a_session(model, where, gpt2):
    spec = SPECS["swap"]
    with model.session(**where):
        with model.apply(spec), model.trace(PROMPT):
            found = model.lm_head.output.save()
    with gpt2.apply(spec):
        assert torch.equal(found, logits_of(gpt2, {}))


def test_a_site_that_the_block_names(model, where, gpt2):
    site = model.site("head_z", 3)
    with model.trace(PROMPT, **where):
        z = site.read().save()
    with gpt2.trace(PROMPT):
        expected = gpt2.site("head_z", 3).read().save()
    assert torch.equal(z, expected)


@pytest.mark.parametrize(
    ("intervention", "error", "message"),
    [
        (Intervention("mlp_out[2]", "swap", prompt="Hi", positions=[40]), InputError, "none at position 40"),
        (Intervention("transformer.h.2.nothing", "zero"), UnknownPathError, "nothing"),
        (Intervention("mlp_out[2]", "set", value=torch.ones(5)), InputError, r"is \[5\]; there it is \[128\]"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(model, where, intervention, error, message):
    with pytest.raises(error, match=message):
        with model.apply(InterventionSpec(intervention)):
            logits_of(model, where)


# --- caches ---------------------------------------------------------------------------------------------------


def test_a_cache(model, where, gpt2):
    with model.trace(PROMPT, **where) as tracer:
        cache = tracer.cache()
    with gpt2.trace(PROMPT) as tracer:
        expected = tracer.cache()
    assert cache.keys() == expected.keys()
    assert repr(cache) == repr(expected)
    assert torch.equal(cache["model.transformer.h.2"].output[0], expected["model.transformer.h.2"].output[0])
    assert torch.equal(cache.model.transformer.h[3].attn.output[0], expected.model.transformer.h[3].attn.output[0])
    assert torch.equal(cache["lm_head"].output, expected["lm_head"].output)
    with pytest.raises(NeverRanError, match="include_inputs=True"):
        _ = cache["lm_head"].inputs


def test_a_cache_of_a_generation_with_inputs(model, where, gpt2):
    with model.generate(PROMPT, max_new_tokens=3, **where) as tracer:
        cache = tracer.cache(modules=["transformer.h.1.mlp", "lm_head"], include_inputs=True, include_output=False)
    with gpt2.generate(PROMPT, max_new_tokens=3) as tracer:
        expected = tracer.cache(modules=["transformer.h.1.mlp", "lm_head"], include_inputs=True)
    assert [call.step for call in cache["lm_head"].calls] == [0, 1, 2]
    for mine, theirs in zip(cache["transformer.h.1.mlp"].calls, expected["transformer.h.1.mlp"].calls, strict=True):
        assert torch.equal(mine.input, theirs.input)
    with pytest.raises(NeverRanError, match="include_output=True"):
        _ = cache["lm_head"].output


def test_caches_of_invokes_have_their_rows(model, where, gpt2):
    with model.trace(**where) as tracer:
        with tracer.invoke(PROMPT):
            cache = tracer.cache(modules=["transformer.h.0"])
        with tracer.invoke([PROMPT, OTHER]):
            second = tracer.cache(modules=["transformer.h.0"])
    assert cache["transformer.h.0"].output[0].shape[0] == 1
    assert second["transformer.h.0"].output[0].shape[0] == 2


def test_a_cache_with_other_names(where):
    if "remote" in where:
        pytest.skip("a module of one's own has no name on a server")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 2)))
    model = NNsight(net, rename={"0": "first", "1.0": "last"})
    with model.trace(torch.ones(1, 3), **where) as tracer:
        cache = tracer.cache()
    assert torch.equal(cache["last"].output, net(torch.ones(1, 3)))
    assert torch.equal(cache.model.last.output, cache["1"].output)


def test_the_part_that_an_invoke_has_not_is_an_error(where):
    if "remote" in where:
        pytest.skip("a module of one's own has no name on a server")

    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sum = torch.nn.Identity()

        def forward(self, x):
            return x + self.sum(x.sum((0, 1)))

    model = NNsight(Mixed())
    with model.trace(**where) as tracer:
        with tracer.invoke(torch.ones(1, 3)):
            cache = tracer.cache(modules=["sum"])
        with tracer.invoke(torch.ones(1, 3)):
            output = model.output.save()
    with pytest.raises(RowsError):
        _ = cache["sum"].output


def test_models_that_share_weights_are_loaded_together():
    model = LanguageModel("nnsight/landmarks")
    with model.edit() as edited:
        model.transformer.h[1].mlp.output[:] = 0
    spec = model.edit(SPECS["by path"])
    with edited.trace(PROMPT):
        silent = edited.transformer.h[1].mlp.output.save()
    assert not silent.any()
    assert model.dispatched
    assert spec.dispatched
    assert spec._module is model._module is edited._module
    assert not torch.equal(logits_of(spec, {}), logits_of(model, {}))
