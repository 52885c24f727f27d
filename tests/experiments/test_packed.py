"""Packed rows: only what comes behind an edit is computed, side by side, with the numbers of whole runs."""

import pytest
import torch
import zoo

from nnsight import LanguageModel
from nnsight.experiments import ablate, activation_patching, log_prob
from nnsight.experiments._memory import Budget
from nnsight.experiments._packed import Layout
from nnsight.experiments._prompts import encode
from nnsight.experiments._runner import Runner
from nnsight.experiments._scoring import NoScore

from .test_families import by_traces

LENGTH = 12


def prepare(name):
    torch.manual_seed(0)
    module = zoo.FAMILIES[name].make().eval()
    return LanguageModel(module), torch.randint(5, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def packs(model, prompts):
    runner = Runner(model, encode(model, prompts), NoScore(), Budget("1GB"))
    runner.record([], keep_stream=True, pack=True)
    return runner.packing is not None


class TestLayout:
    @pytest.mark.parametrize("length", [4, 5, 10, 11])
    def test_all_starts_of_a_prompt_fill_half_as_many_rows(self, length):
        layout = Layout([0] * length, list(range(length)), torch.ones(1, length, dtype=torch.bool))
        assert len(layout.prompts) == (length + 1) // 2
        places = [(int(r), int(p)) for r, p in zip(layout.row.flatten(), layout.pos.flatten(), strict=True) if r >= 0]
        assert sorted(places) == [(row, pos) for row in range(length) for pos in range(row, length)]

    def test_values_come_back_from_their_places(self):
        layout = Layout([0, 1, 1, 0], [1, 0, 3, 2], torch.ones(2, 4, dtype=torch.bool))
        values = torch.rand(4, 4, 3)
        back = layout.unpack(layout.pack(values))
        for row, start in enumerate([1, 0, 3, 2]):
            assert torch.equal(back[row, start:], values[row, start:])
            assert not back[row, :start].any()
        assert torch.equal(layout.pack(values)[layout.ends], values[:, -1])

    def test_a_place_sees_its_own_row_and_what_lies_before_it_in_its_prompt(self):
        real = torch.ones(2, 5, dtype=torch.bool)
        real[1, :2] = False  # padding
        prompts, starts = [0, 0, 1], [1, 4, 3]
        layout = Layout(prompts, starts, real)
        ids = torch.arange(10).view(2, 5)
        seen = layout.inputs(ids, ids, torch.float32)["attention_mask"][:, 0] == 0
        for number in range(len(layout.prompts)):
            for place, row in enumerate(layout.row[number].tolist()):
                if row < 0:
                    assert seen[number, place].nonzero().flatten().tolist() == [5 + place]
                    continue
                pos, start = int(layout.pos[number, place]), starts[row]
                past = [p for p in range(start) if real[prompts[row], p]]
                own = [5 + p for p, r in enumerate(layout.row[number].tolist()) if r == row]
                own = own[: pos - start + 1]
                assert seen[number, place].nonzero().flatten().tolist() == past + own


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "llama", "qwen3_moe", "deepseek_v3"])
def test_causal_models_pack(name):
    model, (clean, corrupted) = prepare(name)
    assert packs(model, corrupted)
    for site in ("resid_pre", "attn_out"):
        found = activation_patching(model, clean, corrupted, log_prob(9), site, progress=False)
        expected = by_traces(model, corrupted, clean, site, found.axes["layer"])
        torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "falcon_alibi", "bamba"])
def test_windows_that_slide_and_states_that_go_on_do_not(name):
    model, (clean, corrupted) = prepare(name)
    assert not packs(model, corrupted)
    found = activation_patching(model, clean, corrupted, log_prob(9), progress=False)
    expected = by_traces(model, corrupted, clean, "resid_pre", found.axes["layer"])
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)


def test_stored_edits_do_not(model):
    ids = torch.arange(5, 17)
    assert packs(model, ids)
    with model.edit() as edited:
        edited.resid_post[0][:, 3] *= 1.5
    assert not packs(edited, ids)
    found = activation_patching(edited, ids, ids.flip(0), log_prob(9), progress=False)
    expected = by_traces(edited, ids.flip(0), ids, "resid_pre", found.axes["layer"])
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)


def test_layers_in_any_order_and_little_memory(model):
    ids = torch.arange(5, 17)
    whole = activation_patching(model, ids, ids.flip(0), log_prob(9), "mlp_out", progress=False)
    some = activation_patching(model, ids, ids.flip(0), log_prob(9), "mlp_out", layers=[2, 0], progress=False)
    torch.testing.assert_close(some.values, whole.values[[2, 0]], rtol=1e-4, atol=1e-4)
    little = activation_patching(model, ids, ids.flip(0), log_prob(9), "mlp_out", memory="300KB", progress=False)
    torch.testing.assert_close(little.values, whole.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["zero", "mean", "direction"])
def test_ablation_of_prompts_of_different_lengths_is_that_of_each(model, mode):
    prompts = [torch.arange(5, 17), torch.arange(9, 14)]
    mode = torch.eye(model._model.config.hidden_size)[3] if mode == "direction" else mode
    reference = torch.arange(20, 32)[None]
    over = ("layer", "pos")
    found = ablate(model, prompts, log_prob(9), "resid_pre", over, mode, reference=reference, progress=False)
    for i, prompt in enumerate(prompts):
        alone = torch.zeros(len(found.axes["layer"]), len(prompt))
        for layer in range(len(alone)):
            means = None
            if isinstance(mode, str) and mode == "mean":
                with model.trace(reference):
                    means = model.resid_pre[layer].mean((0, 1)).clone().save()
            for pos in range(len(prompt)):
                with model.trace(prompt[None]):
                    stream = model.resid_pre[layer]
                    if means is not None:
                        stream[:, pos] = means
                    elif isinstance(mode, str):
                        stream[:, pos] = 0
                    else:
                        stream[:, pos, 3] = 0
                    logits = model.logits[0, -1].save()
                alone[layer, pos] = logits.log_softmax(-1)[9]
        torch.testing.assert_close(found.values[i, :, -len(prompt) :], alone, rtol=1e-4, atol=1e-4)
