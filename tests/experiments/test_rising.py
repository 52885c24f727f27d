"""Rows that join a batch at the layer they are edited at: the numbers of single runs, and each layer runs once."""

import pytest
import torch

from nnsight import LanguageModel, errors
from nnsight.experiments import ablate, activation_patching, cross_entropy, logit_diff
from nnsight.experiments._memory import Budget

from .conftest import HEADS, LAYERS, VOCAB, Plain, build, difference
from .test_patching import by_hooks

METRIC = logit_diff(5, 7)
LENGTH = 24  # long enough that the rows of each layer are a group of their own
ALL_HEADS = [(slice(None), head) for head in range(HEADS)]


@pytest.fixture
def pairs():
    """Four pairs of prompts: `[2, 4, 24]`."""
    return torch.randint(0, VOCAB, (2, 4, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def ids(pairs):
    return pairs[0, 0]


@pytest.fixture
def other_ids(pairs):
    return pairs[1, 0]


def patched(model, clean, corrupted, metric=METRIC, site="head_z", over=("layer", "head"), **options):
    return activation_patching(model, clean, corrupted, metric, site, over, progress=False, **options)


def batches_of(modules, run):
    """How many rows each module was given, call by call."""
    found = [[] for _ in modules]
    handles = [
        module.register_forward_pre_hook(lambda m, args, sizes=sizes: sizes.append(len(args[0])))
        for module, sizes in zip(modules, found, strict=True)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize(("memory", "most"), [("1GB", 1), ("500KB", LAYERS)])
def test_each_layer_runs_once_for_all_rows_that_fit(model, plain, ids, other_ids, memory, most):
    mlps = [layer.mlp for layer in plain.layers]
    sizes = batches_of(mlps, lambda: patched(model, ids, other_ids, memory=memory))
    for layer, found in enumerate(sizes):
        rows = [size for size in found if size > 1]
        assert len(rows) <= most
        assert HEADS * (layer + 1) <= sum(rows) <= HEADS * (layer + 1) + len(rows)  # one plain row a batch at most
    assert most == 1 or len(sizes[-1]) > len(sizes[0]), "the memory was enough for all rows"


@pytest.mark.parametrize("site", ["head_z", "head_q", "neurons", "mlp_out", "resid_post"])
@pytest.mark.parametrize("memory", ["500KB", "1MB", "1GB"])
def test_numbers_are_those_of_single_runs(model, plain, pairs, diff, site, memory):
    clean, corrupted = pairs
    over, places = ("layer",), [(slice(None),)]
    if site.startswith("head"):
        over, places = ("layer", "head"), ALL_HEADS
    expected = by_hooks(plain, corrupted, clean, diff, site, range(LAYERS), places).permute(2, 0, 1)
    found = patched(model, clean, corrupted, site=site, over=over, memory=memory)
    torch.testing.assert_close(found.values.view(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_layers_in_any_order(model, plain, ids, other_ids, diff):
    expected = by_hooks(plain, other_ids[None], ids[None], diff, "head_z", [2, 0, 1], ALL_HEADS)[..., 0]
    found = patched(model, ids, other_ids, layers=[2, 0, 1])
    assert found.axes["layer"] == (2, 0, 1)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)


def test_prompts_of_different_lengths(model, plain, pairs, diff):
    clean = [pairs[0, 0, :9], pairs[0, 1]]  # the plain row that goes along is padded
    corrupted = [pairs[1, 0, :9], pairs[1, 1]]
    found = patched(model, clean, corrupted)
    for i in range(2):
        expected = by_hooks(plain, corrupted[i][None], clean[i][None], diff, "head_z", range(LAYERS), ALL_HEADS)
        torch.testing.assert_close(found.values[i], expected[..., 0], rtol=1e-4, atol=1e-4)


def test_metrics_of_all_positions_and_of_all_prompts(model, plain, pairs):
    clean, corrupted = pairs

    def loss(logits):
        each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), clean[:, 1:], reduction="none")
        return each.mean(-1)

    expected = by_hooks(plain, corrupted, clean, loss, "head_z", range(LAYERS), ALL_HEADS).permute(2, 0, 1)
    found = patched(model, clean, corrupted, cross_entropy())
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)
    of_all = patched(model, clean, corrupted, lambda out: loss(out.logits).mean(), memory="1MB")
    torch.testing.assert_close(of_all.values, expected.mean(0), rtol=1e-4, atol=1e-4)


def test_ablation(model, plain, pairs, diff):
    clean = pairs[0]
    expected = torch.zeros(LAYERS, HEADS, len(clean))
    with torch.no_grad():
        for layer in range(LAYERS):
            for head in range(HEADS):

                def silence(z, head=head):
                    z = z.clone()
                    z[:, :, head] = 0
                    return z

                expected[layer, head] = diff(plain(clean, {("head_z", layer): silence}))
    found = ablate(model, clean, METRIC, "head_z", ("layer", "head"), "zero", progress=False)
    torch.testing.assert_close(found.values, expected.permute(2, 0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["mlp", "attn"])
@pytest.mark.parametrize("breaks", ["silently", "with an error"])
def test_a_model_whose_layers_hand_on_more_than_the_stream_is_run_whole(ids, other_ids, part, breaks):
    """The last layer adds what a part of the middle one gave: a run that starts behind that one lacks it."""
    module = build("gpt2")
    kept = []

    def forget(*_):
        kept.clear()

    def keep(_, args, out):
        kept.append(out[0] if part == "attn" else out)

    def add(_, args, out):
        if not kept and breaks == "silently":
            return out
        if part == "attn":
            return (out[0] + 0.7 * kept[0], *out[1:])
        return out + 0.7 * kept[0][:, -out.shape[1] :]

    module.transformer.register_forward_pre_hook(forget)
    module.transformer.h[1].get_submodule(part).register_forward_hook(keep)
    module.transformer.h[2].get_submodule(part).register_forward_hook(add)
    plain, model = Plain(module, "gpt2"), LanguageModel(module)
    for site, axis, places in (("head_z", "head", ALL_HEADS), ("resid_pre", "pos", [(pos,) for pos in range(LENGTH)])):
        expected = by_hooks(plain, other_ids[None], ids[None], difference, site, range(LAYERS), places)[..., 0]
        for memory in ("1GB", "500KB"):
            found = patched(model, ids, other_ids, site=site, over=("layer", axis), memory=memory)
            torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)


def test_stored_edits_are_there_in_every_run(model, ids, other_ids):
    with model.edit() as edited:
        edited.resid_post[0][:, 3] *= 1.5
    with edited.trace(ids[None]):
        z = [edited.site("head_z", layer).read().clone().save() for layer in range(LAYERS)]
    expected = torch.zeros(LAYERS, HEADS)
    for layer in range(LAYERS):
        for head in range(HEADS):
            with torch.no_grad(), edited.trace(other_ids[None]):
                site = edited.site("head_z", layer)
                live = site.read().clone()
                live[:, :, head] = z[layer][:, :, head]
                site.write(live)
                logits = edited.logits.save()
            expected[layer, head] = difference(logits)[0]
    torch.testing.assert_close(patched(edited, ids, other_ids).values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("spare", "most"), [(0, 9), (1, 9), (2, 6), (4, 6), (5, 3)])
def test_batches_leave_room_for_what_goes_along(spare, most):
    batches = Budget(1000).split(range(54), unit=3, each=100, spare=spare)
    assert [item for batch in batches for item in batch] == list(range(54))
    assert max(map(len, batches)) == most


def test_an_error_in_an_edit_is_told(model, ids):
    with pytest.raises(errors.InputError, match="head_z has 8"):
        ablate(model, ids, METRIC, "head_z", ("layer", "head"), torch.ones(5), progress=False)
