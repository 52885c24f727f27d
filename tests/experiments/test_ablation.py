"""Ablation, against single runs with hooks."""

import pytest
import torch

from nnsight import errors
from nnsight.experiments import ablate, logit_diff

METRIC = logit_diff(5, 7)


def by_hooks(plain, ids, diff, name, replace, places):
    """The metric `[prompt, layer, place]` with `replace(layer, value)` at each place alone."""
    with torch.no_grad():
        found = []
        for layer in range(3):
            for place in places:

                def edit(value, layer=layer, place=place):
                    new = value.clone()
                    index = (slice(None), *place)
                    new[index] = replace(layer, value)[index]
                    return new

                found.append(diff(plain(ids, {(name, layer): edit})))
    return torch.stack(found, 1).view(len(ids), 3, len(places))


def values_of(plain, ids, name):
    with torch.no_grad():
        plain(ids, reads=[(name, layer) for layer in range(3)])
    return [plain.values[name, layer] for layer in range(3)]


HEADS = [(slice(None), head) for head in range(4)]


def test_zero(model, plain, pairs, diff):
    expected = by_hooks(plain, pairs[0], diff, "head_z", lambda layer, value: torch.zeros_like(value), HEADS)
    found = ablate(model, pairs[0], METRIC, mode="zero", progress=False)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(found.baseline["clean"], diff(plain(pairs[0])))


@pytest.mark.parametrize("given", [False, True])
def test_mean(model, plain, pairs, diff, given):
    reference = pairs[1] if given else pairs[0]
    means = [value.mean((0, 1)) for value in values_of(plain, reference, "mlp_out")]
    expected = by_hooks(
        plain,
        pairs[0],
        diff,
        "mlp_out",
        lambda layer, value: means[layer].expand(value.shape),
        [(p,) for p in range(6)],
    )
    found = ablate(
        model,
        pairs[0],
        METRIC,
        "mlp_out",
        ("layer", "pos"),
        "mean",
        reference=reference if given else None,
        progress=False,
    )
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)


def test_mean_leaves_padding_out(model, plain, pairs):
    prompts = [pairs[0, 0], pairs[0, 1, :3]]
    values = torch.cat([values_of(plain, ids[None], "mlp_out")[1][0] for ids in prompts])
    with torch.no_grad():
        logits = plain(pairs[1, :1], {("mlp_out", 1): lambda value: values.mean(0).expand(value.shape)})
    found = ablate(
        model, pairs[1, 0], METRIC, "mlp_out", "layer", "mean", reference=prompts, layers=[1], progress=False
    )
    torch.testing.assert_close(found.values[0], (logits[:, -1, 5] - logits[:, -1, 7])[0], rtol=1e-4, atol=1e-4)


def test_resample_with_one_other_prompt(model, plain, pairs, diff):
    values = values_of(plain, pairs[1, :1], "head_z")
    expected = by_hooks(plain, pairs[0], diff, "head_z", lambda layer, value: values[layer].expand(value.shape), HEADS)
    found = ablate(model, pairs[0], METRIC, mode="resample", reference=pairs[1, :1], progress=False)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)


def test_resample_never_draws_the_prompt_itself(model, plain, pairs, diff):
    values = values_of(plain, pairs[0], "head_z")
    swapped = by_hooks(plain, pairs[0, :2], diff, "head_z", lambda layer, value: values[layer][[1, 0]], HEADS)
    found = ablate(model, pairs[0, :2], METRIC, mode="resample", progress=False)
    torch.testing.assert_close(found.values, swapped, rtol=1e-4, atol=1e-4)


def test_direction(model, plain, pairs, diff):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(5))
    unit = direction / direction.norm()

    def without(_layer, value):
        return value - (value @ unit)[..., None] * unit

    expected = by_hooks(plain, pairs[0], diff, "resid_post", without, [(slice(None),)])[..., 0]
    found = ablate(model, pairs[0], METRIC, "resid_post", "layer", direction, progress=False)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "none"}, "mode is"),
        ({"mode": torch.zeros(8)}, "other than zero"),
        ({"mode": torch.ones(7)}, "has 7 numbers"),
        ({"mode": "resample"}, "no other prompt"),
        ({"sites": "head_pattern", "mode": "mean"}, "use 'zero'"),
    ],
)
def test_what_cannot_be_is_refused(model, ids, options, message):
    with pytest.raises(errors.InputError, match=message):
        ablate(model, ids, METRIC, progress=False, **options)
