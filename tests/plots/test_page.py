"""Pages: one file, no network, prompts as text only, and in a browser (where there is one) every cell is there."""

import json
import re

import pytest
import torch

from nnsight import plots

WORDS = ["The", " $x$ <b>", "</script><script>alert(1)</script>", "\n", "​​"]


def every_figure(**options):
    five = [str(i) for i in range(5)]
    grid = {"rows": five, "columns": WORDS}
    return {
        "heatmap": plots.heatmap(torch.randn(5, 5), title="a <i>title</i>", **grid, **options),
        "lens": plots.lens_grid([WORDS] * 5, torch.rand(5, 5), details=[[[("x", 0.5)]] * 5] * 5, **grid, **options),
        "attention": plots.attention(torch.rand(3, 5, 5), tokens=WORDS, **options),
        "tokens": plots.tokens(WORDS, [0.1, -0.2, float("nan"), 0.4, 0.5], **options),
        "graph": plots.graph(["a", "b<", "c"], [("a", "b<", 1.0), ("b<", "c", -0.3)], **options),
        "trajectory": plots.trajectory(torch.randn(5, 4, 8), labels=WORDS, **options),
    }


@pytest.mark.parametrize("kind", list(every_figure()))
def test_page_is_whole_and_asks_nothing_of_the_network(kind):
    html = every_figure()[kind].interactive().html
    assert html.count("<script") == html.count("</script>") == 1
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|fetch\(|XMLHttp|import\(", html)
    assert set(re.findall(r"https?://[^\"' ]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert f"KINDS.{kind} =" in html


def test_page_has_the_numbers():
    values = [[0.125, float("nan"), -3.0]]
    html = plots.heatmap(values, rows=["a"], columns=["x", "y", "z"], value_label="v").interactive().html
    data = json.loads(re.search(r"const DATA = (.*);\n", html)[1])
    assert data["values"] == [[0.125, None, -3.0]]
    assert (data["rows"], data["columns"], data["label"]) == (["a"], ["x", "y", "z"], "v")
    assert (data["scale"]["low"], data["scale"]["high"]) == (-3, 3)


@pytest.mark.parametrize(("theme", "mark"), [(None, '<html lang="en">'), ("dark", 'data-theme="dark"')])
def test_page_follows_the_theme(theme, mark):
    assert mark in plots.heatmap([[1.0]], rows=["a"], columns=["b"], theme=theme).interactive().html


def test_path_with_the_ending_of_a_page_writes_one(tmp_path):
    figure = plots.tokens(["a"], [1.0], path=tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text("utf-8") == figure.interactive().html


def test_notebook_shows_the_page_in_a_frame():
    page = plots.tokens(['"a"'], [1.0]).interactive()
    frame = page._repr_html_()
    assert frame.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts"' in frame


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_browser_draws_every_part(theme, tmp_path, browse):
    expected = {
        "heatmap": ("<td", 25),
        "lens": ("<td", 25),
        "attention": ("<canvas", 3),
        "tokens": ("<span style", 5),
        "graph": ("<rect", 3),
        "trajectory": ("<circle", 20),
    }
    for kind, figure in every_figure(theme=theme).items():
        path = tmp_path / f"{kind}.html"
        figure.save(path)
        dom = browse("--dump-dom", path.as_uri())
        tag, count = expected[kind]
        drawn = dom.partition("</main>")[0].partition("<main")[2]
        assert drawn.count(tag) == count, kind
        assert "<script" not in drawn
