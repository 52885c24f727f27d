"""The demo: its numbers against plain hooks, and what it prints and writes."""

import json
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nnsight.cli import main

PROMPT = "the Eiffel Tower is in the city of"
CORRUPTED = "the Colosseum Forum is in the city of"


@pytest.fixture
def demo(small_gpt2, tmp_path, capsys):
    """Run the demo, and give what it wrote and printed."""

    def run(*options, prompt=PROMPT, corrupted=CORRUPTED):
        common = ["--model", small_gpt2, "--out", str(tmp_path / "out")]
        assert main(["demo", *common, "--prompt", prompt, "--corrupted", corrupted, *options]) == 0
        numbers = json.loads((tmp_path / "out" / "demo.json").read_text("utf-8"))
        return numbers, capsys.readouterr().out

    return run


@pytest.fixture
def by_hand(small_gpt2):
    """What the demo should find, from plain forward hooks."""
    model = AutoModelForCausalLM.from_pretrained(small_gpt2).eval()
    tokenizer = AutoTokenizer.from_pretrained(small_gpt2)
    blocks = model.transformer.h

    @torch.no_grad()
    def run(prompt, hook=None, layer=0):
        handle = blocks[layer].register_forward_hook(hook or (lambda *_: None))
        try:
            return model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
        finally:
            handle.remove()

    def hidden(prompt, layer):
        found = []
        run(prompt, lambda _module, _args, output: found.append(output), layer)
        return found[0]

    def patched(layer, position):
        state = hidden(PROMPT, layer)

        def patch(_module, _args, output):
            output = output.clone()
            output[:, position] = state[:, position]
            return output

        return run(CORRUPTED, patch, layer)

    def lens(layer):
        return model.lm_head(model.transformer.ln_f(hidden(PROMPT, layer)[0, -1])).softmax(-1)

    run.patched, run.lens, run.tokenizer = patched, lens, tokenizer
    return run


def test_predictions_are_those_of_the_model(demo, by_hand):
    best = by_hand(PROMPT).topk(5)
    found = demo()[0]["predictions"]
    assert [item["token"] for item in found] == [by_hand.tokenizer.decode([i]) for i in best.indices]
    assert [item["probability"] for item in found] == pytest.approx(best.values.tolist())


def test_logit_lens_is_that_of_hooks(demo, by_hand):
    found = demo()[0]["logit_lens"]
    assert [item["layer"] for item in found] == [0, 1, 2]
    for item in found:
        probabilities = by_hand.lens(item["layer"])
        assert item["token"] == by_hand.tokenizer.decode([probabilities.argmax()])
        assert item["probability"] == pytest.approx(probabilities.max().item())


def test_sweep_is_that_of_hooks(demo, by_hand):
    sweep = demo()[0]["patching"]
    clean = by_hand(PROMPT)
    answer = int(clean.argmax())
    assert sweep["answer"] == by_hand.tokenizer.decode([answer])
    assert sweep["clean_probability"] == pytest.approx(clean[answer].item())
    assert sweep["corrupted_probability"] == pytest.approx(by_hand(CORRUPTED)[answer].item())
    assert sweep["tokens"] == PROMPT.split()
    assert sweep["corrupted_tokens"] == CORRUPTED.split()
    expected = [[by_hand.patched(layer, i)[answer].item() for i in range(8)] for layer in range(3)]
    assert torch.tensor(sweep["values"]).tolist() == [pytest.approx(row, abs=1e-6) for row in expected]
    assert len({round(value, 4) for row in expected for value in row}) > 5  # patches differ in effect


def test_figure_is_written(demo, tmp_path):
    _, printed = demo()
    figure = tmp_path / "out" / "patching.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert str(figure) in printed
    assert str(tmp_path / "out" / "demo.json") in printed


def test_print_is_plain_where_there_is_no_terminal(demo):
    numbers, printed = demo()
    assert "\x1b" not in printed
    rows = re.findall(r"^ +layer +(\d+) +([\d. ]+)$", printed, re.M)
    scale = max(numbers["patching"]["clean_probability"], numbers["patching"]["corrupted_probability"])
    digits = 0 if scale >= 0.1 else 1
    assert [[float(cell) for cell in row.split()] for _, row in rows] == [
        [float(f"{100 * value:.{digits}f}") for value in row] for row in numbers["patching"]["values"]
    ]
    columns = next(line for line in printed.splitlines() if line.split() == PROMPT.split())
    below = printed.splitlines()[printed.splitlines().index(columns) + 1]
    assert below.split() == ["Colos…", "Forum"] or below.split() == ["Colosseum", "Forum"]


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({"FORCE_COLOR": "1"}, "48;5;"),
        ({"FORCE_COLOR": "1", "COLORTERM": "truecolor"}, "48;2;"),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, None),
    ],
)
def test_colours_follow_the_environment(demo, monkeypatch, environment, code):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _, printed = demo()
    assert (code in printed) if code else ("\x1b" not in printed)


def test_prompts_of_different_length_leave_the_sweep_out(demo, tmp_path):
    numbers, printed = demo(corrupted="the Colosseum is in the city of")
    assert "the prompt has 8 tokens and the corrupted prompt 7" in printed
    assert "patching" not in numbers
    assert len(numbers["logit_lens"]) == 3
    assert not (tmp_path / "out" / "patching.png").exists()


def test_without_matplotlib_there_are_the_numbers(demo, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "nnsight.plots._figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    numbers, printed = demo()
    assert numbers["patching"]["values"]
    assert 'pip install "nnsight[plots]"' in printed
    assert not (tmp_path / "out" / "patching.png").exists()


def test_settings_of_the_process_are_restored(demo):
    before = torch.get_num_threads(), torch.is_grad_enabled()
    torch.set_num_threads(2)
    try:
        demo()
        assert (torch.get_num_threads(), torch.is_grad_enabled()) == (2, True)
    finally:
        torch.set_num_threads(before[0])


def test_bundled_model_knows_the_answer(tmp_path):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "demo.json").read_text("utf-8"))
    assert numbers["predictions"][0]["token"] == " Paris"
    sweep = numbers["patching"]
    assert sweep["clean_probability"] > 2 * sweep["corrupted_probability"]
    assert max(max(row) for row in sweep["values"][:3]) > 2 * sweep["corrupted_probability"]
