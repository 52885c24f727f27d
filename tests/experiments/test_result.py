"""Results as data: choosing, scaling, intervals, tables, files."""

import math

import pytest
import torch

from nnsight import errors
from nnsight.experiments import Result


@pytest.fixture
def result():
    values = torch.arange(24.0).view(4, 2, 3)
    return Result(
        values,
        {"pair": range(4), "layer": (0, 1), "pos": ("The", " Tower", " is")},
        {"corrupted": torch.tensor([0.0, 1.0, 2.0, 3.0]), "clean": torch.tensor([10.0, 11.0, 12.0, 23.0])},
        name="logit_diff",
        title="patching",
        details={"prompts": ["a", "b"]},
    )


def test_select(result):
    assert result.select(layer=1, pos=" is").values.tolist() == [5.0, 11.0, 17.0, 23.0]
    part = result.select(pair=[2, 0], pos=["The"])
    assert part.axes == {"pair": (2, 0), "layer": (0, 1), "pos": ("The",)}
    assert part.values[:, 0, 0].tolist() == [12.0, 0.0]
    assert part.baseline["clean"].tolist() == [12.0, 10.0]
    one = result.select(pair=3)
    assert list(one.axes) == ["layer", "pos"]
    assert one.baseline["corrupted"].item() == 3
    texts = Result(torch.zeros(2, 2), {"layer": (0, 1), "pos": (0, 1)}, texts=tuple("abcd"))
    assert texts.select(pos=1).texts == ("b", "d")


@pytest.mark.parametrize("choice", [{"head": 1}, {"layer": 2}, {"pos": "Tower"}])
def test_what_is_not_there_cannot_be_selected(result, choice):
    with pytest.raises(errors.InputError):
        result.select(**choice)


def test_a_label_that_stands_twice_is_refused():
    result = Result(torch.zeros(2), {"pos": (" the", " the")})
    with pytest.raises(errors.InputError, match="2 times"):
        result.select(pos=" the")


def test_normalized(result):
    found = result.normalized()
    for i in range(4):
        low, high = result.baseline["corrupted"][i], result.baseline["clean"][i]
        torch.testing.assert_close(found.values[i], (result.values[i] - low) / (high - low))
    assert found.baseline["corrupted"].tolist() == [0.0] * 4
    assert found.baseline["clean"].tolist() == [1.0] * 4
    averaged = result.mean().normalized()
    torch.testing.assert_close(averaged.values, (result.values.mean(0) - 1.5) / (14.0 - 1.5))
    only = Result(torch.tensor([2.0, 3.0]), {"head": (0, 1)}, {"clean": torch.tensor(4.0)}).normalized()
    assert only.values.tolist() == [0.5, 0.75]


def test_no_scale_is_refused(result):
    with pytest.raises(errors.InputError, match="no baseline"):
        Result(torch.zeros(2), {"head": (0, 1)}).normalized()
    with pytest.raises(errors.InputError, match="same value"):
        Result(torch.zeros(1), {"head": (0,)}, {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}).normalized()


def test_mean_leaves_nan_out():
    result = Result(torch.tensor([[1.0, math.nan], [3.0, 5.0]]), {"pair": (0, 1), "pos": (0, 1)})
    assert result.mean().values.tolist() == [2.0, 5.0]
    assert result.best() == {"pos": 1}
    assert result.best(smallest=True) == {"pos": 0}


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(200):
        draws = torch.randn(30, 1, generator=generator)
        bounds = Result(draws, {"pair": range(30), "head": (0,)}).bootstrap_ci(0.9, 300, seed=trial)
        low, mean, high = bounds.values[:, 0].tolist()
        assert low < mean < high
        hits += low < 0 < high
    assert 0.8 < hits / 200 < 0.97
    assert bounds.axes == {"bound": ("low", "mean", "high"), "head": (0,)}


def test_bootstrap_needs_pairs(result):
    with pytest.raises(errors.InputError, match="two prompt pairs"):
        result.select(pair=0).bootstrap_ci()
    with pytest.raises(errors.InputError, match="level"):
        result.bootstrap_ci(95)


def test_dataframe(result):
    pytest.importorskip("pandas")
    frame = result.to_dataframe()
    assert list(frame.columns) == ["pair", "layer", "pos", "value"]
    row = frame[(frame.pair == 2) & (frame.layer == 1) & (frame.pos == " is")]
    assert row.value.tolist() == [17.0]
    texts = Result(torch.zeros(2), {"pos": (0, 1)}, texts=("a", "b"))
    assert texts.to_dataframe().text.tolist() == ["a", "b"]


def test_dataframe_without_pandas_says_what_to_install(result, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        result.to_dataframe()


def test_save_and_load(result, tmp_path):
    texts = Result(result.values, result.axes, result.baseline, "n", "t", tuple(map(str, range(24))), {"a": [1]})
    for one in (result, texts, Result(torch.tensor(2.0), {})):
        one.save(tmp_path / "result.safetensors")
        again = Result.load(tmp_path / "result.safetensors")
        assert torch.equal(again.values, one.values)
        assert again.axes == one.axes
        assert again.baseline.keys() == one.baseline.keys()
        assert list(again.baseline) == list(one.baseline)
        for name, value in one.baseline.items():
            assert torch.equal(again.baseline[name], value)
        assert (again.name, again.title, again.texts, again.details) == (one.name, one.title, one.texts, one.details)


def test_another_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(errors.InputError, match="no result"):
        Result.load(tmp_path / "other.safetensors")


def test_what_does_not_fit_is_refused():
    with pytest.raises(errors.InputError, match="do not fit"):
        Result(torch.zeros(2, 3), {"layer": (0, 1), "pos": (0, 1)})
    with pytest.raises(errors.InputError, match="texts"):
        Result(torch.zeros(2), {"pos": (0, 1)}, texts=("a",))


def test_it_cannot_be_changed(result):
    with pytest.raises(AttributeError):
        result.values = torch.zeros(1)


def test_text_shows_labels_and_numbers(result):
    text = repr(result)
    assert "logit_diff: pair 4 × layer 2 × pos 3" in text
    assert "corrupted 1.5, clean 14" in text
    *_, head, first, second = text.splitlines()
    assert head.split() == ["layer", "\\", "pos", "The", "Tower", "is"]
    assert first.split() == ["0", "9.0", "10.0", "11.0"]  # averages over the pairs
    assert second.split() == ["1", "12.0", "13.0", "14.0"]


def test_text_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    wide = Result(torch.randn(40, 60), {"layer": range(40), "pos": range(60)})
    lines = repr(wide).splitlines()
    assert max(map(len, lines)) <= 82
    assert lines[-1] == "… 16 more rows"


def test_texts_are_shown_in_place_of_numbers():
    lens = Result(torch.tensor([[0.1, 0.9]]), {"layer": (3,), "pos": ("a", "b")}, texts=(" Rome", " Paris"))
    assert repr(lens).splitlines()[-1].split() == ["3", "Rome", "Paris"]


def test_html_escapes_labels(result):
    page = Result(torch.tensor([[-1.0, 2.0]]), {"layer": (0,), "pos": ("<b>", "&")}, title="<i>")._repr_html_()
    assert "&lt;b&gt;" in page
    assert "&amp;" in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert page.count("<td") == 2
    assert result._repr_html_().count("<td") == 6


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 2, 3), (0,)])
def test_every_shape_reads(shape):
    result = Result(torch.zeros(shape), {f"axis{i}": range(size) for i, size in enumerate(shape)})
    assert repr(result)
    assert result._repr_html_().startswith("<div>")


def test_plot(result, tmp_path):
    result.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    figure = result.select(layer=0).plot()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["The", " Tower", " is"]
    with pytest.raises(errors.InputError, match="two axes"):
        Result(torch.zeros(2, 2, 2), {"site": (0, 1), "layer": (0, 1), "pos": (0, 1)}).plot()
