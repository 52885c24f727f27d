"""Activation patching, against loops of single runs with hooks."""

import pytest
import torch

from nnsight import errors
from nnsight.experiments import activation_patching, kl, logit_diff

HEADS = 4
METRIC = logit_diff(5, 7)


def by_hooks(plain, base, source, diff, name, layers, places):
    """The metric with each place patched alone; `places` are indices behind the batch dimension."""
    with torch.no_grad():
        plain(source, reads=[(name, layer) for layer in layers])
        values = dict(plain.values)
        found = []
        for layer in layers:
            for place in places:

                def patch(value, layer=layer, place=place):
                    value = value.clone()
                    value[(slice(None), *place)] = values[name, layer][(slice(None), *place)]
                    return value

                found.append(diff(plain(base, {(name, layer): patch})))
    return torch.stack(found).view(len(layers), len(places), -1)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "neurons"])
def test_layer_and_position(model, plain, ids, other_ids, diff, name, direction):
    clean, corrupted = ids[None], other_ids[None]
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    expected = by_hooks(plain, base, source, diff, name, range(3), [(p,) for p in range(6)])[..., 0]
    found = activation_patching(model, ids, other_ids, METRIC, name, direction=direction, progress=False)
    assert list(found.axes) == ["layer", "pos"]
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(found.baseline["clean"], diff(plain(clean))[0])
        torch.testing.assert_close(found.baseline["corrupted"], diff(plain(corrupted))[0])
    assert (found.values - found.baseline["corrupted" if direction == "denoise" else "clean"]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["head_z", "head_q", "head_v"])
def test_layer_and_head_of_many_pairs(model, plain, pairs, diff, name):
    clean, corrupted = pairs
    heads = 2 if name == "head_v" and plain.family == "llama" else HEADS
    expected = by_hooks(plain, corrupted, clean, diff, name, range(3), [(slice(None), h) for h in range(heads)])
    found = activation_patching(model, clean, corrupted, METRIC, name, ("layer", "head"), progress=False)
    assert list(found.axes) == ["pair", "layer", "head"]
    torch.testing.assert_close(found.values, expected.permute(2, 0, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean().values, expected.mean(-1), rtol=1e-4, atol=1e-4)


def test_layer_position_and_head(model, plain, ids, other_ids, diff):
    places = [(p, h) for p in range(6) for h in range(HEADS)]
    expected = by_hooks(plain, other_ids[None], ids[None], diff, "head_z", [1, 2], places)
    found = activation_patching(
        model, ids, other_ids, METRIC, "head_z", ("layer", "pos", "head"), layers=[1, 2], progress=False
    )
    torch.testing.assert_close(found.values.flatten(1), expected[..., 0], rtol=1e-4, atol=1e-4)
    assert found.axes["layer"] == (1, 2)


def test_pattern_by_head(ids, other_ids, diff):
    """Patching a pattern is patching what the head mixes with it: `z = pattern @ v` of the patched run."""
    from .conftest import Plain, build

    module = build("gpt2")
    module.set_attn_implementation("eager")
    plain, clean, corrupted = Plain(module, "gpt2"), ids[None], other_ids[None]
    with torch.no_grad():
        pattern = module(clean, output_attentions=True).attentions
        expected = torch.zeros(3, HEADS)
        for layer in range(3):
            for head in range(HEADS):
                plain(corrupted, reads=[("head_v", layer)])
                v = plain.values["head_v", layer]

                def patch(z, layer=layer, head=head, v=v):
                    z = z.clone()
                    z[:, :, head] = pattern[layer][:, head] @ v[:, :, head]
                    return z

                expected[layer, head] = diff(plain(corrupted, {("head_z", layer): patch}))[0]
    from nnsight import LanguageModel

    model = LanguageModel(build("gpt2"))  # sdpa
    found = activation_patching(model, ids, other_ids, METRIC, "head_pattern", ("layer", "head"), progress=False)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)


def test_whole_layers_of_several_sites(model, plain, ids, other_ids, diff):
    found = activation_patching(model, ids, other_ids, METRIC, ["attn_out", "mlp_out"], "layer", progress=False)
    for name in ("attn_out", "mlp_out"):
        expected = by_hooks(plain, other_ids[None], ids[None], diff, name, range(3), [(slice(None),)])[:, 0, 0]
        torch.testing.assert_close(found.select(site=name).values, expected, rtol=1e-4, atol=1e-4)


def test_memory_splits_the_batches_and_changes_no_number(model, pairs):
    whole = activation_patching(model, *pairs, METRIC, progress=False)
    split = activation_patching(model, *pairs, METRIC, memory="250KB", progress=False)
    torch.testing.assert_close(split.values, whole.values, rtol=1e-4, atol=1e-4)


def test_memory_that_is_too_little_is_refused(model, pairs):
    with pytest.raises(errors.InputError, match="does not fit into the budget"):
        activation_patching(model, *pairs, METRIC, memory="5KB", progress=False)
    with pytest.raises(errors.InputError, match="no amount of memory"):
        activation_patching(model, *pairs, METRIC, memory="much", progress=False)


def test_functions_as_metrics(model, pairs):
    expected = activation_patching(model, *pairs, METRIC, progress=False)
    each = activation_patching(model, *pairs, lambda out: out.logits[:, -1, 5] - out.logits[:, -1, 7], progress=False)
    torch.testing.assert_close(each.values, expected.values, rtol=1e-4, atol=1e-4)
    one = activation_patching(model, *pairs, lambda out: out[:, -1, 5].mean() - out[:, -1, 7].mean(), progress=False)
    assert list(one.axes) == ["layer", "pos"]
    torch.testing.assert_close(one.values, expected.values.mean(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(errors.InputError, match=r"shape \[3, 60\]"):
        activation_patching(model, *pairs, lambda out: out.logits[:, -1], progress=False)


def test_pairs_of_different_lengths_are_their_single_runs(model, pairs):
    clean = [pairs[0, 0], pairs[0, 1, :4]]
    corrupted = [pairs[1, 0], pairs[1, 1, :4]]
    found = activation_patching(model, clean, corrupted, METRIC, progress=False)
    assert found.axes["pos"] == (-6, -5, -4, -3, -2, -1)
    for i in range(2):
        alone = activation_patching(model, clean[i], corrupted[i], METRIC, progress=False)
        size = len(clean[i])
        torch.testing.assert_close(found.values[i, :, -size:], alone.values, rtol=1e-4, atol=1e-4)
        assert found.values[i, :, : 6 - size].isnan().all()


def test_kl_compares_with_the_clean_run(model, plain, pairs):
    clean, corrupted = pairs
    found = activation_patching(model, clean, corrupted, kl(), direction="noise", layers=[2], progress=False)
    assert (found.baseline["clean"].abs() < 1e-6).all()
    with torch.no_grad():
        reference = plain(clean)[:, -1].log_softmax(-1)
        plain(corrupted, reads=[("resid_pre", 2)])
        source = plain.values["resid_pre", 2]

        def patch(value):
            return torch.cat([value[:, :5], source[:, 5:]], 1)

        expected = (reference.exp() * (reference - plain(clean, {("resid_pre", 2): patch})[:, -1].log_softmax(-1))).sum(
            -1
        )
    torch.testing.assert_close(found.values[:, 0, 5], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"over": ("pos",)}, "over names 'layer'"),
        ({"over": ("layer", "head")}, "has no axis 'head'"),
        ({"direction": "back"}, "'denoise' or 'noise'"),
        ({"clean": torch.zeros(5, dtype=torch.long)}, "does not line up"),
        ({"metric": 3}, "A metric is"),
        ({"metric": logit_diff([1, 2], 3)}, "2 answers do not pair"),
    ],
)
def test_what_cannot_be_is_refused(model, ids, other_ids, change, message):
    given = {"clean": ids, "corrupted": other_ids, "metric": METRIC, "progress": False, **change}
    with pytest.raises(errors.InputError, match=message):
        activation_patching(model, **given)


def test_unknown_site_is_refused(model, ids, other_ids):
    with pytest.raises(errors.NamesError, match="resid_pr"):
        activation_patching(model, ids, other_ids, METRIC, "resid_pr", progress=False)


def test_model_is_left_as_it_was(model, plain, ids, other_ids):
    before = {name: set(vars(module)) for name, module in plain.module.named_modules()}
    activation_patching(model, ids, other_ids, METRIC, progress=False)
    assert {name: set(vars(module)) for name, module in plain.module.named_modules()} == before
