"""Heat maps: what is drawn, whether it can be read, and that nothing else happens."""

import subprocess
import sys
from itertools import pairwise

import numpy
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnsight.plots import heatmap

WORDS = "The Colosseum is in the city of Rome antidisestablishment $x$".split()


def draw(rows, columns, values=None, **options):
    values = torch.rand(rows, columns) if values is None else values
    names = [WORDS[i % len(WORDS)] for i in range(columns)]
    return heatmap(values, rows=[f"layer {i}" for i in range(rows)], columns=names, **options)


def drawn(figure):
    """The tick labels of both axes and the renderer, after drawing."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    return axes.get_xticklabels(), axes.get_yticklabels(), canvas.get_renderer()


def test_result_is_a_figure_with_the_values():
    values = torch.tensor([[0.0, 0.25, 0.5], [0.75, 1.0, 0.1]])
    figure = heatmap(values, rows=["a", "b"], columns=["x", "y", "z"], title="title", value_label="label")
    assert isinstance(figure, Figure)
    axes, bar = figure.axes
    assert numpy.array_equal(axes.images[0].get_array(), values.double().numpy())
    assert axes.get_title(loc="left") == "title"
    assert bar.get_ylabel() == "label"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y", "z"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize(("rows", "columns"), [(2, 1), (3, 10), (12, 12), (12, 30), (48, 100), (80, 300)])
def test_labels_are_inside_the_figure_and_do_not_overlap(rows, columns):
    figure = draw(rows, columns)
    xlabels, ylabels, renderer = drawn(figure)
    x = [label.get_window_extent(renderer) for label in xlabels]
    y = [label.get_window_extent(renderer) for label in ylabels]
    assert all(left.x1 <= right.x0 for left, right in pairwise(x))
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(y))
    whole = figure.get_tightbbox(renderer).padded(0.02)
    for box in (*x, *y):
        assert whole.x0 * figure.dpi <= box.x0
        assert box.y1 <= whole.y1 * figure.dpi
        assert whole.y0 * figure.dpi <= box.y0


def test_every_label_of_a_table_of_12_by_30_is_there_at_a_readable_size():
    xlabels, ylabels, _ = drawn(draw(12, 30))
    assert (len(xlabels), len(ylabels)) == (30, 12)
    assert all(label.get_fontsize() >= 8 for label in (*xlabels, *ylabels))


@pytest.mark.parametrize(("rows", "columns", "there"), [(3, 10, True), (12, 30, True), (48, 100, False)])
def test_numbers_stand_in_the_cells_where_there_is_room(rows, columns, there):
    values = torch.rand(rows, columns)
    figure = draw(rows, columns, values)
    _, _, renderer = drawn(figure)
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts] == (
        [f"{value:.2f}" for value in values.double().flatten().tolist()] if there else []
    )
    cell = figure.axes[0].get_window_extent(renderer).width / columns
    assert all(text.get_window_extent(renderer).width < cell for text in texts)


@pytest.mark.parametrize(
    ("largest", "text"), [(1234.0, "1234"), (58.0, "58"), (5.0, "5.0"), (1.0, "1.00"), (0.069, "0.069")]
)
def test_decimals_follow_the_largest_number(largest, text):
    figure = heatmap([[largest]], rows=["a"], columns=["x"])
    assert [text.get_text() for text in figure.axes[0].texts] == [text]


def test_numbers_contrast_with_their_cells():
    figure = heatmap([[0.0, 1.0]], rows=["a"], columns=["x", "y"])
    assert [text.get_color() for text in figure.axes[0].texts] == ["white", "black"]


@pytest.mark.parametrize(
    ("values", "name", "limits"),
    [
        ([[0.2, 0.8]], "viridis", (0.2, 0.8)),
        ([[-0.2, -0.8]], "viridis", (-0.8, -0.2)),
        ([[-1.0, 3.0]], "PuOr_r", (-3.0, 3.0)),
        ([[0.5, 0.5]], "viridis", (0.0, 0.5)),
        ([[0.0, 0.0]], "viridis", (0.0, 1.0)),
    ],
)
def test_scale_follows_the_signs(values, name, limits):
    image = heatmap(values, rows=["a"], columns=["x", "y"]).axes[0].images[0]
    assert image.cmap.name == name
    assert image.get_clim() == pytest.approx(limits)


@pytest.mark.parametrize(
    "values",
    [
        [[0.5, 1.0]],
        numpy.array([[0.5, 1.0]]),
        torch.tensor([[0.5, 1.0]], dtype=torch.bfloat16),
        torch.tensor([[0.5, 1.0]], requires_grad=True),
    ],
    ids=["lists", "array", "bfloat16", "gradient"],
)
def test_values_of_every_kind(values):
    image = heatmap(values, rows=["a"], columns=["x", "y"]).axes[0].images[0]
    assert image.get_array().tolist() == [[0.5, 1.0]]


def test_missing_numbers_leave_grey_cells():
    figure = heatmap([[float("nan"), 1.0]], rows=["a"], columns=["x", "y"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.00"]
    red, green, blue, _ = figure.axes[0].images[0].to_rgba(numpy.array([[numpy.nan]]))[0, 0]
    assert red == green == blue
    assert not heatmap([[float("nan")]], rows=["a"], columns=["x"]).axes[0].texts


@pytest.mark.parametrize("values", [[[1.0, 2.0]], [1.0, 2.0], [[1.0], [2.0], [3.0]]])
def test_labels_that_do_not_match(values):
    with pytest.raises(ValueError, match="2 rows and 1 columns"):
        heatmap(values, rows=["a", "b"], columns=["x"])


@pytest.mark.parametrize("columns", [1, 30])
def test_long_title_is_wrapped_into_the_figure(columns):
    title = "a title that is a good deal wider than a table of one cell " * 8
    figure = draw(2, columns, title=title)
    renderer = drawn(figure)[2]
    axes = figure.axes[0]
    box = axes._left_title.get_window_extent(renderer)
    assert axes.get_title(loc="left").split() == title.split()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1
    assert axes.get_window_extent(renderer).height > 0.3 * figure.dpi


def test_file_gets_the_format_of_its_name(tmp_path):
    for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        draw(2, 2, path=tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


def test_notebook_shows_it():
    assert draw(2, 2)._repr_png_().startswith(b"\x89PNG")


def test_import_is_light_and_pyplot_is_never_used(tmp_path):
    code = (
        "import sys\n"
        "from nnsight.plots import heatmap\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"heatmap([[1.0]], rows=['a'], columns=['x'], path={str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "nnsight.plots._figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "nnsight\[plots\]"'):
        draw(2, 2)
