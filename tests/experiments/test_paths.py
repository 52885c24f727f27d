"""Path patching, against both runs done with plain hooks."""

import pytest
import torch

from nnsight import errors
from nnsight.experiments import activation_patching, logit_diff, path_patching

METRIC = logit_diff(5, 7)
OUTPUTS = ("attn_out", "mlp_out")


def first_run(plain, base, source, sender, head, frozen, reads):
    """What the receivers see with one head patched and the later outputs held."""
    with torch.no_grad():
        plain(source, reads=[sender])
        new = plain.values[sender]
        plain(base, reads=frozen)
        held = dict(plain.values)

        def patch(value):
            value = value.clone()
            value[:, :, head] = new[:, :, head]
            return value

        edits = {sender: patch}
        for site in frozen:
            edits[site] = lambda value, site=site: held[site]
        logits = plain(base, edits, reads=reads)
        return dict(plain.values), logits


def later(layer, mlps):
    sites = [("attn_out", later) for later in range(layer + 1, 3)]
    return sites + ([("mlp_out", later) for later in range(layer, 3)] if mlps else [])


@pytest.mark.parametrize("mlps", [False, True])
def test_to_the_logits(model, plain, pairs, diff, mlps):
    clean, corrupted = pairs
    found = path_patching(model, clean, corrupted, METRIC, freeze_mlps=mlps, progress=False)
    for layer in range(3):
        for head in range(4):
            _, logits = first_run(plain, clean, corrupted, ("head_z", layer), head, later(layer, mlps), [])
            torch.testing.assert_close(found.values[:, layer, head], diff(logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["head_q", "head_v"])
def test_to_heads(model, plain, pairs, diff, name):
    clean, corrupted = pairs
    receivers = [(name, 2, 1), (name, 1)]
    found = path_patching(model, clean, corrupted, METRIC, receivers=receivers, direction="denoise", progress=False)
    for layer in range(3):
        for head in range(4):
            reached = [one for one in receivers if one[1] > layer]
            reads = [one[:2] for one in reached]
            seen = {}
            if reached:  # the outputs are held behind the reads, hooks of the receivers see what comes in
                seen, _ = first_run(plain, corrupted, clean, ("head_z", layer), head, later(layer, False), reads)
            edits = {}
            for one in reached:

                def give(value, one=one, seen=seen):
                    new = value.clone()
                    index = (slice(None), slice(None), *one[2:])
                    new[index] = seen[one[:2]][index]
                    return new

                edits[one[:2]] = give
            with torch.no_grad():
                expected = diff(plain(corrupted, edits))
            torch.testing.assert_close(found.values[:, layer, head], expected, rtol=1e-4, atol=1e-4)


def test_direct_paths_of_the_last_layer_are_all_paths(model, ids, other_ids):
    paths = path_patching(model, ids, other_ids, METRIC, layers=[2], progress=False)
    patched = activation_patching(
        model, ids, other_ids, METRIC, "head_z", ("layer", "head"), direction="noise", layers=[2], progress=False
    )
    torch.testing.assert_close(paths.values, patched.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("receivers", ["head_q", []])
def test_what_is_no_receiver_is_refused(model, ids, other_ids, receivers):
    with pytest.raises(errors.InputError, match="receivers"):
        path_patching(model, ids, other_ids, METRIC, receivers=receivers, progress=False)
