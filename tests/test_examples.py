"""The examples show what their papers show, and their controls do not."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
PAGE = ROOT / "docs" / "examples.md"
PICTURES = ROOT / "docs" / "pictures"
MOST_BYTES = 80_000  # of a picture

Play = Callable[[str], Any]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Runs a script as a reader does, and gives what it found."""
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> Any:
        found = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")["found"]
        drawn = (tmp_path / f"{name}.png").read_bytes()
        assert drawn.startswith(b"\x89PNG")
        assert len(drawn) < MOST_BYTES
        return found

    return run


@pytest.mark.slow
def test_superposition(play: Play) -> None:
    counts = {name: (features.norm(dim=-1) > 0.5).sum(-1).tolist() for name, features in play("superposition").items()}
    assert counts == {"relu": [2, 4, 5], "linear": [2, 2, 2]}


@pytest.mark.slow
def test_saturation(play: Play) -> None:
    found = play("saturation")
    single, integrated, values = found.values()
    assert single == sorted(single, reverse=True)
    assert single[-1] <= 0.2
    assert min(integrated) >= 0.95
    assert values[-1] >= single[-1] + 0.3


@pytest.mark.slow
def test_causal_tracing(play: Play) -> None:
    found = play("causal_tracing")
    spoilt, clean = found["spoilt"], found["clean"]
    assert clean > 0.9
    assert spoilt < 0.1
    subject, last = found["state, subject"], found["state, last"]
    assert subject[0] > 0.4 > 0.2 > last[0]  # early, at the subject
    assert last[-1] == pytest.approx(clean, abs=1e-3)  # late, at the last token
    assert subject[-1] == pytest.approx(spoilt, abs=1e-3)
    assert max(found["MLPs, subject"][:3]) > 0.8 * subject[0]
    assert max(found["attention, subject"]) < spoilt + 0.02
    assert max(found["attention, last"]) == max(found["attention, last"][6:11])
    assert max(found["another's state, subject"] + found["another's state, last"]) < 0.1


@pytest.mark.slow
def test_induction(play: Play) -> None:
    found = play("induction")
    two, one = found["two layers"], found["one layer"]
    assert two["accuracy"] >= 0.99
    assert two["induction"] >= 0.8
    assert two["previous token"] >= 0.9
    assert two["heads"]["previous_token"][0] == 0
    assert two["heads"]["induction"][0] == 1
    assert max(one["accuracy"], one["induction"]) <= 0.2


@pytest.mark.slow
def test_indirect_object(play: Play) -> None:
    found = play("indirect_object")
    patches, components = found["patches"].values, found["components"]
    s2, last = 8, 12
    assert found["right"] >= 0.99
    assert patches[0, s2] == pytest.approx(1, abs=1e-3)
    assert patches[1, s2] >= 0.9
    assert patches[2, last] >= 0.3
    patches[:, [s2, last]] = 0
    assert patches.abs().max() <= 0.05
    assert components.values.sum().item() == pytest.approx(components.baseline["logit_diff"].item(), abs=1e-3)
    assert components.baseline["logit_diff"] > 3


@pytest.mark.slow
def test_refusal(play: Play) -> None:
    found = play("refusal")
    refused = {name: (shares["harmful"], shares["harmless"]) for name, shares in found.items()}
    assert refused == {
        "as trained": (1, 0),
        "direction ablated": (0, 0),
        "random ablated": (1, 0),
        "direction added": (1, 1),
        "random added": (1, 0),
    }
    assert found["direction ablated"]["answered"] >= 0.6  # of eight places, one is right by chance
    assert found["as trained"]["answered"] == 0


@pytest.mark.slow
def test_sparse_autoencoder(play: Play) -> None:
    found = play("sparse_autoencoder")
    best, control = (found[name].max(-1).values for name in ("cosines", "control"))
    assert best.min() >= 0.9
    assert len(set(found["cosines"].argmax(-1).tolist())) == len(best)  # a latent for each word
    assert control.mean() <= 0.8
    assert min(found["recalled"]) >= 0.95
    forgotten, others = found["without its latent"]
    assert forgotten <= 0.15
    assert others >= 0.95


@pytest.mark.slow
def test_grokking(play: Play) -> None:
    found = play("grokking")
    shown, others = zip(*found["curve"], strict=True)
    first = next(i for i, accuracy in enumerate(shown) if accuracy > 0.99)
    assert others[first] < 0.2  # by heart first
    assert others[-1] >= 0.99
    assert found["top"] >= 0.9
    assert found["excluded"] <= 0.05
    assert found["others excluded"] >= 0.9
    known, unknown, top = found["random answers"]
    assert known > 0.99
    assert unknown < 0.05
    assert top < 0.4


def test_every_example_is_tested_and_shown() -> None:
    names = {script.stem for script in SCRIPTS}
    assert {f"test_{name}" for name in names} <= globals().keys()
    page = PAGE.read_text("utf-8")
    assert set(re.findall(r"\(\.\./examples/(\w+)\.py\)", page)) == names
    assert set(re.findall(r"!\[[^\]]+\]\(pictures/(\w+)\.png\)", page)) == names
    assert {picture.stem for picture in PICTURES.glob("*")} == names


@pytest.mark.parametrize("picture", sorted(PICTURES.glob("*.png")), ids=lambda path: path.stem)
def test_pictures_are_small(picture: Path) -> None:
    assert picture.stat().st_size < MOST_BYTES
