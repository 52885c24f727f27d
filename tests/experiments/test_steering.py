"""Steering vectors and steered models, against plain hooks."""

import pytest
import torch

from nnsight import errors
from nnsight.experiments import steer, steering_vector


def values_of(plain, ids, site):
    with torch.no_grad():
        plain(ids, reads=[site])
    return plain.values[site]


def test_difference_of_means(model, plain, pairs):
    ups, downs = (values_of(plain, ids, ("resid_post", 1)) for ids in pairs)
    found = steering_vector(model, pairs[0], pairs[1], layer=1)
    torch.testing.assert_close(found, ups[:, -1].mean(0) - downs[:, -1].mean(0))
    found = steering_vector(model, pairs[0], pairs[1], layer=-2, position=None)
    torch.testing.assert_close(found, ups.mean((0, 1)) - downs.mean((0, 1)))
    heads = values_of(plain, pairs[0], ("head_z", 1))[:, 2] - values_of(plain, pairs[1], ("head_z", 1))[:, 2]
    found = steering_vector(model, pairs[0], pairs[1], "head_z", 1, position=2)
    torch.testing.assert_close(found, heads.mean(0))


def test_positions_of_different_lengths_are_counted_in_each_prompt(model, plain, pairs):
    prompts = [pairs[0, 0], pairs[0, 1, :4]]
    alone = [values_of(plain, ids[None], ("mlp_out", 2))[0] for ids in prompts]
    zero = values_of(plain, pairs[1, :1], ("mlp_out", 2))[0]
    for position in (1, -2):
        expected = torch.stack([value[position] for value in alone]).mean(0) - zero[position]
        found = steering_vector(model, prompts, pairs[1, :1], "mlp_out", 2, position=position)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected = torch.stack([value.mean(0) for value in alone]).mean(0) - zero.mean(0)
    found = steering_vector(model, prompts, pairs[1, :1], "mlp_out", 2, position=None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(errors.InputError, match="no token at 5"):
        steering_vector(model, prompts, pairs[1, :1], position=5)


def test_principal_component(model, plain, pairs):
    changes = (
        values_of(plain, pairs[0], ("resid_post", 1))[:, -1] - values_of(plain, pairs[1], ("resid_post", 1))[:, -1]
    )
    found = steering_vector(model, pairs[0], pairs[1], layer=1, method="pca")
    _, vectors = torch.linalg.eigh(changes.T @ changes)
    direction = vectors[:, -1]
    torch.testing.assert_close(found, direction * (changes @ direction).mean(), rtol=1e-3, atol=1e-3)
    assert (changes @ found).mean() > 0
    with pytest.raises(errors.InputError, match="do not pair"):
        steering_vector(model, pairs[0], pairs[1, :2], method="pca")


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "head_z"])
def test_steered_model_adds_the_vector_and_the_other_does_not(model, plain, ids, site):
    vector = torch.randn((4, 8) if site == "head_z" else (32,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(ids[None], {(site, 1): lambda value: value + 2.0 * vector})
        untouched = plain(ids[None])
    with steer(model, vector, 1, site=site, strength=2.0) as steered:
        with steered.trace(ids[None]):
            found = steered.logits.save()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with model.trace(ids[None]):
        found = model.logits.save()
    torch.testing.assert_close(found, untouched)


def test_steering_holds_at_each_step_of_a_generation(model, plain, ids):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 3
    tokens = ids[None]
    with torch.no_grad():
        for _ in range(4):
            logits = plain(tokens, {("resid_post", 1): lambda value: value + vector})
            tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    steered = steer(model, vector, 1).model
    with steered.generate(ids[None], max_new_tokens=4, do_sample=False):
        found = steered.generator.output.save()
    assert found.tolist() == tokens.tolist()


def test_in_place(family, ids):
    from nnsight import LanguageModel

    from .conftest import Plain, build

    plain = Plain(build(family), family)
    model = LanguageModel(plain.module)
    vector = torch.ones(32)
    with torch.no_grad():
        expected, untouched = plain(ids[None], {("resid_post", 2): lambda value: value + vector}), plain(ids[None])
    assert steer(model, vector, 2, inplace=True).model is model
    with model.trace(ids[None]):
        found = model.logits.save()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    model.clear_edits()
    with model.trace(ids[None]):
        found = model.logits.save()
    torch.testing.assert_close(found, untouched)


@pytest.mark.parametrize("edited", [0, 1, 2])
@pytest.mark.parametrize("site", ["resid_post", "head_q"])
def test_an_experiment_on_a_steered_model(model, plain, ids, other_ids, diff, site, edited):
    """Its runs do not start in the middle where an edit lies before."""
    from nnsight.experiments import activation_patching, logit_diff

    vector = torch.randn((4, 8) if site == "head_q" else (32,), generator=torch.Generator().manual_seed(0))
    steered = steer(model, vector, edited, site=site).model
    found = activation_patching(steered, ids, other_ids, logit_diff(5, 7), "mlp_out", "layer", progress=False)

    def add(value):
        return value + vector

    with torch.no_grad():
        for layer in range(3):
            plain(ids[None], {(site, edited): add}, reads=[("mlp_out", layer)])
            new = plain.values["mlp_out", layer]
            logits = plain(other_ids[None], {(site, edited): add, ("mlp_out", layer): lambda value, new=new: new})
            torch.testing.assert_close(found.values[layer], diff(logits)[0], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_added_is_refused(model):
    with pytest.raises(errors.InputError, match="cannot be added"):
        steer(model, torch.ones(4, 8), 1)
    with pytest.raises(errors.InputError, match="method is"):
        steering_vector(model, [[1]], [[2]], method="mean")
