"""Attribution patching, against gradients taken with plain hooks."""

import pytest
import torch

from nnsight import errors
from nnsight.experiments import activation_patching, attribution_patching, logit_diff, rank

METRIC = logit_diff(5, 7)


def gradient(plain, ids, diff, site, value):
    """The metric's gradient at `value`, put at `site`."""
    leaf = value.clone().requires_grad_()
    return torch.autograd.grad(diff(plain(ids, {site: lambda _, leaf=leaf: leaf})).sum(), leaf)[0]


def values_of(plain, ids, name):
    with torch.no_grad():
        plain(ids, reads=[(name, layer) for layer in range(3)])
    return [plain.values[name, layer] for layer in range(3)]


@pytest.mark.parametrize("name", ["resid_pre", "attn_out", "mlp_out"])
def test_gradient_times_change(model, plain, pairs, diff, name):
    clean, corrupted = pairs
    source, base = values_of(plain, clean, name), values_of(plain, corrupted, name)
    found = attribution_patching(model, clean, corrupted, METRIC, name, progress=False)
    with torch.no_grad():
        start = diff(plain(corrupted))
    for layer in range(3):
        slope = gradient(plain, corrupted, diff, (name, layer), base[layer])
        expected = start[:, None] + ((source[layer] - base[layer]) * slope).sum(-1)
        torch.testing.assert_close(found.values[:, layer], expected, rtol=1e-4, atol=1e-4)


def test_heads(model, plain, ids, other_ids, diff):
    found = attribution_patching(
        model, ids, other_ids, METRIC, "head_z", ("layer", "head"), direction="noise", progress=False
    )
    source, base = values_of(plain, other_ids[None], "head_z"), values_of(plain, ids[None], "head_z")
    for layer in range(3):
        slope = gradient(plain, ids[None], diff, ("head_z", layer), base[layer])
        expected = found.baseline["clean"] + ((source[layer] - base[layer]) * slope).sum((0, 1, 3))
        torch.testing.assert_close(found.values[layer], expected, rtol=1e-4, atol=1e-4)


def test_integrated_gradients(model, plain, pairs, diff):
    clean, corrupted = pairs
    steps = 4
    source, base = values_of(plain, clean, "resid_mid"), values_of(plain, corrupted, "resid_mid")
    found = attribution_patching(
        model, clean, corrupted, METRIC, "resid_mid", method="ig", steps=steps, memory="800KB", progress=False
    )
    for layer in range(3):
        change = source[layer] - base[layer]
        slopes = []
        for step in range(steps):
            moved = base[layer] + (step + 0.5) / steps * change
            leaf = moved.clone().requires_grad_()
            slopes.append(
                torch.autograd.grad(
                    diff(plain(corrupted, {("resid_mid", layer): lambda _, leaf=leaf: leaf})).sum(), leaf
                )[0]
            )
        effect = (change * torch.stack(slopes).mean(0)).sum(-1)
        expected = found.baseline["corrupted"][:, None] + effect
        torch.testing.assert_close(found.values[:, layer], expected, rtol=1e-4, atol=1e-4)


def test_integrated_gradients_add_up_to_the_patched_layer(model, ids, other_ids):
    whole = activation_patching(model, ids, other_ids, METRIC, "mlp_out", "layer", progress=False)
    found = attribution_patching(model, ids, other_ids, METRIC, "mlp_out", method="ig", steps=200, progress=False)
    base = found.baseline["corrupted"]
    torch.testing.assert_close((found.values - base).sum(-1), whole.values - base, rtol=2e-2, atol=2e-2)
    atp = attribution_patching(model, ids, other_ids, METRIC, "mlp_out", progress=False)
    assert ((atp.values - base).sum(-1) - (whole.values - base)).abs().max() > 0.1  # which the plain gradient does not


def test_one_number_for_all_prompts(model, pairs):
    each = attribution_patching(model, *pairs, METRIC, progress=False)
    one = attribution_patching(
        model, *pairs, lambda out: (out.logits[:, -1, 5] - out.logits[:, -1, 7]).mean(), progress=False
    )
    torch.testing.assert_close(one.values, each.mean().values, rtol=1e-4, atol=1e-4)


def test_different_lengths(model, pairs):
    clean, corrupted = [pairs[0, 0], pairs[0, 1, :4]], [pairs[1, 0], pairs[1, 1, :4]]
    found = attribution_patching(model, clean, corrupted, METRIC, progress=False)
    alone = attribution_patching(model, clean[1], corrupted[1], METRIC, progress=False)
    torch.testing.assert_close(found.values[1, :, 2:], alone.values, rtol=1e-4, atol=1e-4)
    assert found.values[1, :, :2].isnan().all()


def test_metric_without_gradient_is_refused(model, ids, other_ids):
    with pytest.raises(errors.InputError, match="has no gradient"):
        attribution_patching(model, ids, other_ids, rank(5), progress=False)
    with pytest.raises(errors.InputError, match="method is"):
        attribution_patching(model, ids, other_ids, METRIC, method="shap", progress=False)
