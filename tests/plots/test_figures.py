"""Lens grids, attention, tokens, graphs and trajectories: what is drawn, and whether it can be read."""

from itertools import combinations, pairwise

import numpy
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nnsight import plots

TOKENS = "The| E|iff|el| Tower| is| in| the| city| of".split("|")


def drawn(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def boxes(texts, renderer):
    return [text.get_window_extent(renderer) for text in texts if text.get_text() and text.get_visible()]


def apart(found):
    return not any(a.shrunk(0.98, 0.9).overlaps(b.shrunk(0.98, 0.9)) for a, b in combinations(found, 2))


def lens(rows, columns, **options):
    tokens = [[TOKENS[(i + j) % len(TOKENS)] for j in range(columns)] for i in range(rows)]
    names = [TOKENS[j % len(TOKENS)] for j in range(columns)]
    return plots.lens_grid(
        tokens, torch.rand(rows, columns), rows=[f"layer {i}" for i in range(rows)], columns=names, **options
    )


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (12, 10), (12, 30)])
def test_lens_writes_every_token_in_its_cell(rows, columns):
    figure = lens(rows, columns)
    renderer = drawn(figure)
    axes = figure.axes[0]
    texts = axes.texts
    assert len(texts) == rows * columns
    assert texts[-1].get_text() == TOKENS[(rows + columns - 2) % len(TOKENS)].strip()
    assert all(text.get_fontsize() >= 8 for text in texts)
    cell = axes.get_window_extent(renderer).width / columns
    assert all(box.width <= cell for box in boxes(texts, renderer))
    assert axes.images[0].get_clim() == (0, 1)


def test_long_tokens_are_cut_in_the_picture_and_whole_in_the_page():
    figure = plots.lens_grid([["antidisestablishment"]], [[0.5]], rows=["a"], columns=["b"])
    assert figure.axes[0].texts[0].get_text() == "antidises…"
    assert "antidisestablishment" in figure.interactive().html


def test_lens_of_numbers_that_are_no_probabilities_has_their_range():
    figure = plots.lens_grid([["a", "b"]], [[-2.0, 5.0]], rows=["x"], columns=["y", "z"])
    assert figure.axes[0].images[0].get_clim() == (-2, 5)


@pytest.mark.parametrize(("heads", "count"), [(1, 10), (4, 10), (12, 30), (5, 1)])
def test_attention_has_a_picture_of_each_head_with_labels_apart(heads, count):
    patterns = torch.rand(heads, count, count).tril()
    figure = plots.attention(patterns, tokens=[TOKENS[i % 10] for i in range(count)])
    renderer = drawn(figure)
    shown = [axes for axes in figure.axes if axes.images and axes.get_visible()]
    assert len(shown) == heads
    for axes, pattern in zip(shown, patterns.double(), strict=True):
        assert numpy.array_equal(axes.images[0].get_array(), pattern.numpy())
        assert axes.images[0].get_clim() == (0, pytest.approx(patterns.max().item()))
    assert apart(boxes(shown[0].get_yticklabels(), renderer))
    assert apart(boxes(shown[-1].get_xticklabels(), renderer))
    assert len(shown[0].get_yticklabels()) == count


def test_attention_from_some_tokens_to_others():
    figure = plots.attention(torch.rand(2, 3), tokens=["a", "b"], key_tokens=["x", "y", "z"], heads=["decoder 0"])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y", "z"]
    assert axes.get_title() == "decoder 0"


def test_tokens_are_written_in_lines_that_fit():
    words = [*TOKENS, "\n", *TOKENS * 3]
    figure = plots.tokens(words, torch.randn(len(words)))
    renderer = drawn(figure)
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts] == [word.replace("\n", "↵") for word in words]
    assert apart(boxes(texts, renderer))
    whole = figure.axes[0].get_window_extent(renderer)
    assert all(whole.x0 - 1 <= box.x0 and box.x1 <= whole.x1 + 1 for box in boxes(texts, renderer))
    rows = sorted({round(text.get_position()[1], 3) for text in texts})
    assert len(rows) >= 3
    first = [text for text in texts if round(text.get_position()[1], 3) == rows[0]]
    assert len(first) == 11  # the line ends behind the token that ends it


def test_tokens_have_the_colours_of_their_numbers():
    figure = plots.tokens(["a", "b", "c"], [0.0, 1.0, float("nan")])
    low, high, missing = (patch.get_facecolor()[:3] for patch in figure.axes[0].patches)
    assert sum(low) > sum(high)  # from the paper to deep blue
    assert missing[0] == missing[1] == missing[2]


EDGES = [("a", "b", 1.0), ("b", "c", -0.5), ("a", "c", 0.25), ("a", "d", 0.1)]


def test_graph_runs_from_the_top_down_with_boxes_apart():
    figure = plots.graph(["a", "b", "c", "d"], EDGES)
    renderer = drawn(figure)
    axes = figure.axes[0]
    height = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert all(height[source] < height[target] for source, target, _ in EDGES)  # the axis points down
    from matplotlib.patches import FancyBboxPatch, PathPatch

    assert apart([patch.get_window_extent(renderer) for patch in axes.patches if isinstance(patch, FancyBboxPatch)])
    lines = [patch for patch in axes.patches if isinstance(patch, PathPatch)]
    widths = [patch.get_linewidth() for patch in lines]
    assert widths == sorted(widths, reverse=True)
    assert [patch.get_linestyle() != "-" for patch in lines] == [False, True, False, False]


def test_long_edge_goes_around_the_boxes_in_between():
    from nnsight.plots._layered import place

    widths = dict.fromkeys("abcdef", 60.0)
    edges = [*pairwise("abcdef"), ("a", "f"), ("b", "e")]
    places, routes, _ = place(widths, edges, 50.0)
    for (source, target), route in routes.items():
        for x, y in route[1:-1]:
            others = [places[node] for node in widths if node not in (source, target)]
            assert all(abs(x - ox) > 30 for ox, oy in others if oy == y)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([("a", "x")], "'x', which is no node"),
        ([("a", "b"), ("a", "b")], "two edges"),
        ([("a", "b"), ("b", "a")], "no circle"),
    ],
)
def test_graph_that_cannot_be_drawn(edges, message):
    with pytest.raises(ValueError, match=message):
        plots.graph(["a", "b"], edges)


def test_trajectory_is_the_projection_on_the_principal_components():
    states = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    figure = plots.trajectory(states, labels=["a", "b", "c"])
    found = numpy.stack([numpy.stack(line.get_data(), -1) for line in figure.axes[0].lines])
    flat = states.flatten(0, 1).numpy()
    centred = flat - flat.mean(0)
    values, vectors = numpy.linalg.eigh(centred.T @ centred)
    expected = centred @ vectors[:, ::-1][:, :2]
    for k in range(2):
        ours, theirs = found.reshape(-1, 2)[:, k], expected[:, k]
        assert numpy.allclose(ours, theirs) or numpy.allclose(ours, -theirs)
    assert f"{values[-1] / values.sum():.0%}" in figure.axes[0].get_xlabel()


def test_normalized_trajectory_ignores_lengths():
    states = torch.randn(2, 4, 8)
    lengths = torch.rand(2, 4, 1) + 0.5
    one, other = (plots.trajectory(s, labels=["a", "b"], normalize=True) for s in (states, states * lengths))
    for a, b in zip(one.axes[0].lines, other.axes[0].lines, strict=True):
        assert numpy.allclose(a.get_data(), b.get_data(), atol=1e-5)


def test_trajectory_of_few_points():
    figure = plots.trajectory([[[1.0]]], labels=["a"])
    assert figure.axes[0].lines[0].get_data()[0].tolist() == [0.0]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.lens_grid([["a"]], [[1.0, 2.0]], rows=["x"], columns=["y", "z"]), "lens grid of 1 rows"),
        (lambda: plots.attention(torch.rand(2, 3, 3), tokens=["a", "b"]), r"this is \[2, 3, 3\]"),
        (lambda: plots.tokens(["a"], [1.0, 2.0]), "1 tokens need as many"),
        (lambda: plots.trajectory(torch.rand(2, 3, 4), labels=["a"]), "2 paths of 3 steps"),
        (lambda: plots.trajectory(torch.tensor([[float("nan")]]), labels=["a"]), "finite"),
        (lambda: plots.heatmap([[1.0]], rows=["a"], columns=["b"], theme="sepia"), "no theme 'sepia'"),
    ],
)
def test_what_does_not_match_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def luminance(colour):
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return numpy.dot(linear, [0.2126, 0.7152, 0.0722])


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["light", "dark"])
@pytest.mark.parametrize("kind", ["signed", "even", "amount"])
def test_ink_is_read_on_every_colour_of_every_scale(name, kind):
    from nnsight.plots._theme import THEMES, Scale, ink_on

    theme = THEMES[name]
    colours = Scale(kind, 0, 1).colours(theme)(numpy.linspace(0, 1, 101))
    assert min(contrast(ink_on(colour), colour[:3]) for colour in colours) >= 4
    assert contrast(theme.ink, theme.paper) >= 7
    assert contrast(theme.muted, theme.paper) >= 4.5


@pytest.mark.parametrize("name", ["light", "dark"])
def test_scales_can_be_told_apart_without_red_and_green(name):
    """Machado, Oliveira and Fernandes (2009): what people without red or green cones see."""
    from nnsight.plots._theme import THEMES, Scale

    missing = [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
    for matrix in missing:
        ends = numpy.clip(
            Scale("signed", -1, 1).colours(THEMES[name])([0.15, 0.5, 0.85])[:, :3] @ numpy.array(matrix).T, 0, 1
        )
        assert all(numpy.abs(a - b).sum() > 0.35 for a, b in combinations(ends, 2))
        series = numpy.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in THEMES[name].series])
        seen = numpy.clip(series @ numpy.array(matrix).T, 0, 1)
        assert all(numpy.abs(a - b).sum() > 0.12 for a, b in combinations(seen, 2))
