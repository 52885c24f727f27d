"""Steering vectors and steered models, against plain hooks."""

from contextlib import nullcontext

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
    with steer(model, vector, 2, inplace=True) as steered:  # the statement adds nothing
        torch.testing.assert_close(logits_of(steered, ids), expected, rtol=1e-4, atol=1e-4)
    assert steered is model
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


def logits_of(model, ids):
    with model.trace(ids[None]):
        return model.logits.save()


def test_a_model_is_steered_inside_the_with_statement(model, plain, ids):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        once = plain(ids[None], {("resid_post", 1): lambda value: value + 3 * vector})
        twice = plain(
            ids[None], {("resid_post", 1): lambda value: value + 2 * vector, ("mlp_out", 2): lambda v: v + vector}
        )
        untouched = plain(ids[None])
    steering = model.steer(vector, 1, strength=3)
    for _ in range(2):  # it can be entered again
        with steering as steered:
            assert steered is model
            torch.testing.assert_close(logits_of(model, ids), once, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits_of(model, ids), untouched)
    with model.steer(vector, 1, strength=2), model.steer(vector, -1, site="mlp_out"):
        torch.testing.assert_close(logits_of(model, ids), twice, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(model, ids), untouched)


def test_an_error_inside_ends_the_steering(model, plain, ids):
    with torch.no_grad():
        untouched = plain(ids[None])
    with pytest.raises(ZeroDivisionError):
        with model.steer(torch.ones(32), 1):
            1 / 0
    torch.testing.assert_close(logits_of(model, ids), untouched)


def test_the_copy_stays_steered(model, plain, ids):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(ids[None], {("resid_post", 0): lambda value: value + vector})
        untouched = plain(ids[None])
    steering = model.steer(vector, 0)
    assert steering.model is not model
    with steering:
        torch.testing.assert_close(logits_of(steering.model, ids), expected, rtol=1e-4, atol=1e-4)  # once, not twice
    torch.testing.assert_close(logits_of(steering.model, ids), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(model, ids), untouched)


def test_a_generation_is_steered_inside_the_with_statement(model, ids):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 3
    found = []
    for steered in (model, model.steer(vector, 1).model):
        with model.steer(vector, 1) if steered is model else nullcontext():
            with steered.generate(ids[None], max_new_tokens=4, do_sample=False):
                found.append(steered.generator.output.save().tolist())
    with model.generate(ids[None], max_new_tokens=4, do_sample=False):
        plain_ids = model.generator.output.save().tolist()
    assert found[0] == found[1] != plain_ids


def test_steering_is_not_begun_in_a_trace(model, ids):
    steering = model.steer(torch.ones(32), 1)
    with pytest.raises(errors.InputError, match="a trace is open"):
        with model.trace(ids[None]):
            with steering:
                pass


def test_what_cannot_be_added_is_refused(model):
    with pytest.raises(errors.InputError, match="cannot be added"):
        steer(model, torch.ones(4, 8), 1)
    with pytest.raises(errors.InputError, match="method is"):
        steering_vector(model, [[1]], [[2]], method="mean")
