"""Activations on disk: the numbers are those of plain hooks on single runs, and a killed run leaves the same files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from nnsight import LanguageModel, NNsight, errors
from nnsight.experiments import ActivationStore, collect_activations

PROMPTS = [
    "The Eiffel Tower is in the city of",
    "The Colosseum",
    "Hello there",
    "The Great Wall is in the country of",
    "The Louvre is in the city of",
    "The",
] * 3
LINEAR = "transformer.h.2.mlp"


@pytest.fixture(scope="module")
def model():
    return LanguageModel("nnsight/landmarks", dispatch=True)


def hooked(model, prompt, path, *, inputs=False):
    """A module's output (or input) `[seq, d]` for one prompt alone, by a plain hook."""
    found = []

    def keep(module, args, output=None):
        found.append((args[0] if inputs else output if isinstance(output, torch.Tensor) else output[0])[0].clone())

    module = model._model.get_submodule(path)
    handle = module.register_forward_pre_hook(keep) if inputs else module.register_forward_hook(keep)
    with handle, torch.no_grad():
        model._model(torch.tensor([model.tokenizer(prompt)["input_ids"]]))
    return found[0]


def test_every_row_is_that_of_a_plain_single_run(model, tmp_path):
    sites = ["resid_pre[3]", "mlp_out[2]", "head_z[1]", "transformer.h.4.attn", "transformer.h.2.mlp.input"]
    store = collect_activations(
        model, PROMPTS, sites, to=tmp_path, progress=False, shard_bytes=120_000, batch_tokens=30
    )
    assert len(store.manifest["shards"]) > 2
    assert store.complete
    assert store.prompts == len(PROMPTS)
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert store["token"].tolist() == [i for row in ids for i in row]
    assert store["prompt"].tolist() == [n for n, row in enumerate(ids) for _ in row]
    assert store["position"].tolist() == [p for row in ids for p in range(len(row))]
    expected = {
        "resid_pre[3]": lambda p: hooked(model, p, "transformer.h.3", inputs=True),
        "mlp_out[2]": lambda p: hooked(model, p, LINEAR),
        "head_z[1]": lambda p: hooked(model, p, "transformer.h.1.attn.c_proj", inputs=True).unflatten(-1, (4, -1)),
        "transformer.h.4.attn.output": lambda p: hooked(model, p, "transformer.h.4.attn"),
        "transformer.h.2.mlp.input": lambda p: hooked(model, p, LINEAR, inputs=True),
    }
    assert set(store.sites) == set(expected)
    for key, one in expected.items():
        plain = torch.cat([one(prompt) for prompt in PROMPTS])
        assert store[key].shape == plain.shape
        torch.testing.assert_close(store[key], plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("positions", "choose"),
    [
        ("last", lambda ids: [len(ids) - 1]),
        ([0, -1], lambda ids: [0, len(ids) - 1]),
        (lambda ids: range(0, len(ids), 2), lambda ids: list(range(0, len(ids), 2))),
        (lambda ids: [] if len(ids) < 4 else [3], lambda ids: [] if len(ids) < 4 else [3]),
    ],
    ids=["last", "list", "function", "of some prompts"],
)
def test_positions(model, tmp_path, positions, choose):
    prompts = [prompt for prompt in PROMPTS if len(model.tokenizer(prompt)["input_ids"]) > 1]
    store = collect_activations(model, prompts, "mlp_out[2]", to=tmp_path, positions=positions, progress=False)
    wanted = [(n, p) for n, prompt in enumerate(prompts) for p in choose(model.tokenizer(prompt)["input_ids"])]
    assert list(zip(store["prompt"].tolist(), store["position"].tolist(), strict=True)) == wanted
    plain = torch.stack([hooked(model, prompts[n], LINEAR)[p] for n, p in wanted])
    torch.testing.assert_close(store["mlp_out[2]"], plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(model, tmp_path, dtype):
    store = collect_activations(model, PROMPTS[:3], "mlp_out[2]", to=tmp_path, dtype=dtype, progress=False)
    plain = torch.cat([hooked(model, prompt, LINEAR) for prompt in PROMPTS[:3]])
    assert store["mlp_out[2]"].dtype == dtype
    torch.testing.assert_close(store["mlp_out[2]"].float(), plain, atol=2e-2, rtol=1e-2)


def test_prompts_of_every_kind_and_an_iterator(model, tmp_path):
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:3]]
    kinds = {
        "texts": PROMPTS[:3],
        "ids": ids,
        "tensors": [torch.tensor(row) for row in ids],
        "rows": [{"text": PROMPTS[0], "n": 1}, {"text": PROMPTS[1]}, {"input_ids": ids[2]}],
        "iterator": iter(PROMPTS[:3]),
    }
    stores = [
        collect_activations(model, prompts, "mlp_out[2]", to=tmp_path / kind, progress=False)
        for kind, prompts in kinds.items()
    ]
    assert all(torch.equal(store["mlp_out[2]"], stores[0]["mlp_out[2]"]) for store in stores)


def test_max_length_cuts(model, tmp_path):
    store = collect_activations(model, PROMPTS[:1], "mlp_out[2]", to=tmp_path, max_length=3, progress=False)
    torch.testing.assert_close(store["mlp_out[2]"], hooked(model, PROMPTS[0], LINEAR)[:3], atol=2e-5, rtol=1e-4)


def test_value_that_the_model_changes_afterwards_is_what_was_read(tmp_path):
    net = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(9, 4))
    store = collect_activations(NNsight(net), [[1, 2, 3]], ["0", "2"], to=tmp_path, progress=False)
    assert torch.equal(store["0.output"], net[0].weight[1:4].detach())
    assert (store["0.output"] < 0).any()


def test_places_are_read_in_the_order_of_the_model(model, tmp_path):
    sites = ["lm_head", "mlp_out[5]", "transformer.h.1", "resid_mid[1]"]
    store = collect_activations(model, PROMPTS[:2], sites, to=tmp_path, progress=False)
    assert store.sites == ("resid_mid[1]", "transformer.h.1.output", "mlp_out[5]", "lm_head.output")


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_killed_at_every_moment_it_goes_on_to_the_same_files(tmp_path):
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 16


def test_second_call_of_a_complete_store_computes_nothing(model, tmp_path):
    first = collect_activations(model, PROMPTS, "mlp_out[2]", to=tmp_path, progress=False)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = collect_activations(model, PROMPTS, "mlp_out[2]", to=tmp_path, progress=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert torch.equal(first["mlp_out[2]"], again["mlp_out[2]"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["Something else", *PROMPTS[1:]]}, "made of other prompts"),
        ({"prompts": [*PROMPTS, "One more"]}, "complete with 18 prompts"),
        ({"prompts": PROMPTS[:4]}, "made of other prompts"),
        ({"positions": "last"}, "positions 'all' instead of 'last'"),
        ({"sites": "mlp_out[3]"}, "sites"),
        ({"dtype": torch.float16}, "sites"),
    ],
)
def test_folder_of_other_activations_is_refused(model, tmp_path, change, message):
    given = {"prompts": PROMPTS, "sites": "mlp_out[2]", "to": tmp_path, "progress": False}
    collect_activations(model, **given)
    with pytest.raises(errors.InputError, match=message):
        collect_activations(model, **{**given, **change})


def test_another_model_is_refused(tmp_path):
    for seed, expected in ((0, None), (1, "model")):
        torch.manual_seed(seed)
        model = NNsight(torch.nn.Sequential(torch.nn.Embedding(9, 4)))
        if expected:
            with pytest.raises(errors.InputError, match="holds other activations, with model"):
                collect_activations(model, [[1, 2]], "0", to=tmp_path, progress=False)
        else:
            collect_activations(model, [[1, 2]], "0", to=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"prompts": []}, errors.InputError, "no prompts"),
        ({"prompts": ["a", ""]}, errors.InputError, "Prompt 1 has no tokens"),
        ({"prompts": [3.5]}, errors.InputError, "text or token ids"),
        ({"prompts": [{"label": 1}]}, errors.InputError, "neither `input_ids` nor `text`"),
        ({"positions": "first"}, errors.InputError, "'first'"),
        ({"positions": [40]}, errors.InputError, "none at position 40"),
        ({"positions": [0, 0]}, errors.InputError, "twice"),
        ({"sites": []}, errors.InputError, "at least one place"),
        ({"sites": "head_pattern[2]"}, errors.RowsError, r"head_pattern\[2\] is \[3, 4, 5, 5\]"),
        ({"sites": "transformer.h.2.mlp.nothing"}, errors.UnknownPathError, "nothing"),
    ],
)
def test_what_cannot_be_collected_is_refused(model, tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        collect_activations(
            model, **{"prompts": PROMPTS, "sites": "mlp_out[2]", "to": tmp_path / "x", "progress": False, **given}
        )


# --- the store -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return collect_activations(model, PROMPTS, "mlp_out[2]", to=folder, shard_bytes=20_000, progress=False)


def test_rows_by_number(store):
    whole = store["mlp_out[2]"]
    for i in (0, 57, len(store) - 1, -1):
        row = store[i]
        assert torch.equal(row["mlp_out[2]"], whole[i])
        assert row["prompt"] == store["prompt"][i]
    indices = torch.tensor([5, 100, 5, -1])
    assert torch.equal(store.read("mlp_out[2]", indices), whole[indices])
    assert torch.equal(store.read("mlp_out[2]", slice(20, 90)), whole[20:90])
    assert torch.equal(store.read("mlp_out[2]", slice(90, 20, -3)), whole[range(90, 20, -3)])
    with pytest.raises(IndexError, match="none at"):
        store[len(store)]
    with pytest.raises(IndexError, match="indices run"):
        store.rows(torch.tensor([0, len(store)]))


def test_batches_give_every_row_once_in_an_order_of_the_seed(store):
    def order(seed):
        pairs = [torch.stack([b["prompt"], b["position"]], 1) for b in store.batches(32, seed=seed)]
        return [tuple(pair) for pair in torch.cat(pairs).tolist()]

    plain = list(zip(store["prompt"].tolist(), store["position"].tolist(), strict=True))
    assert order(None) == plain
    assert order(1) == order(1)
    assert order(1) != order(2) != plain
    assert sorted(order(1)) == sorted(plain)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader_reads_it_shuffled(store, workers):
    loader = DataLoader(
        store.shuffled(3), batch_size=16, num_workers=workers, multiprocessing_context="spawn" if workers else None
    )
    expected = list(store.batches(16, seed=3))
    for batch, other in zip(loader, expected, strict=True):
        assert torch.equal(batch["mlp_out[2]"], other["mlp_out[2]"])
        assert torch.equal(batch["token"], other["token"])
    one = store.shuffled(3)[0]
    assert torch.equal(one["mlp_out[2]"], expected[0]["mlp_out[2]"][0])


def test_files_are_mapped_and_never_changed(store):
    row = store[0]
    row["mlp_out[2]"].zero_()
    store["mlp_out[2]"].zero_()
    assert store[0]["mlp_out[2]"].abs().sum() > 0
    assert store.read("mlp_out[2]", slice(0, 2)).abs().sum() > 0


def test_what_is_not_there(store, tmp_path):
    with pytest.raises(errors.LoadError, match="no manifest"):
        ActivationStore(tmp_path)
    with pytest.raises(errors.InputError, match="has no 'mlp_out"):
        store["mlp_out[7]"]
    manifest = store.manifest
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(errors.LoadError, match="lacks shard-00000"):
        ActivationStore(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(errors.LoadError, match="format 99"):
        ActivationStore(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(errors.LoadError, match="is no manifest"):
        ActivationStore(tmp_path)


def test_repr_tells_what_is_in_it(store):
    assert "rows of 18 prompts; mlp_out[2] [128] float32" in repr(store)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_memory_does_not_grow_with_the_prompts(tmp_path):
    code = """
import sys, torch
from nnsight import NNsight
from nnsight.experiments import collect_activations
torch.manual_seed(0)
model = NNsight(torch.nn.Sequential(torch.nn.Embedding(50, 64), torch.nn.Linear(64, 64)))
page = 4096
def rss(): return int(open("/proc/self/statm").read().split()[1]) * page
sizes = []
def prompts(n):
    for i in range(n):
        if i % 5000 == 0: sizes.append(rss())
        yield [i % 50, i % 7, i % 11, 3]
collect_activations(model, prompts(60_000), ["0", "1"], to=sys.argv[1], shard_bytes=2**21, batch_tokens=4096, progress=False)
early, late = max(sizes[2:5]), max(sizes[-3:])
print((late - early) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "s"], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8  # MiB; the activations are 117
