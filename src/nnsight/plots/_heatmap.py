"""heatmap: a table of numbers as colours."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# In inches.
_CELL = (0.55, 0.34)  # of a small table; larger ones get narrower cells
_LARGEST = (14.0, 10.0)  # the cells of a table together
_LEAST = (2.5, 1.2)
_LETTER = (0.075, 0.13)  # of tick labels and annotations, as drawn at _FONT points
_FONT = 9


def heatmap(
    values: Any,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    value_label: str = "",
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw a table of numbers as colours, with each number in its cell where there is room.

    Numbers of one sign get a scale of even lightness; those of both signs one that is lightest at zero. Both
    can be read by people who are colour-blind. No window is ever opened.

    Example:
        >>> from nnsight.plots import heatmap
        >>> figure = heatmap([[0.1, 0.9], [0.4, 0.2]], rows=["layer 0", "layer 1"], columns=["The", "city"])
        >>> figure.savefig("grid.png")      # doctest: +SKIP

    Args:
        values: Numbers `[row, column]`: a tensor, an array or lists. NaN leaves a cell grey.
        rows: A label for each row, from the top.
        columns: A label for each column.
        title: What the figure shows.
        value_label: What the numbers are, with their unit.
        path: A file to write too; its ending names the format.

    Returns:
        The figure, a `matplotlib.figure.Figure`.

    Raises:
        ValueError: There are not as many labels as rows or columns.
        ImportError: matplotlib is not installed.
    """
    table = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if table.shape != (len(rows), len(columns)) or not table.numel():
        raise ValueError(
            f"A heat map of {len(rows)} rows and {len(columns)} columns needs values of shape "
            f"[{len(rows)}, {len(columns)}], at least one; these are {list(table.shape)}."
        )
    layout = _plan(rows, columns, title)
    figure = _import_figure()(figsize=layout.size, layout="constrained")
    axes = figure.subplots()
    image = _draw_cells(axes, table)
    figure.colorbar(image, ax=axes, label=_literal(value_label), pad=0.02)
    _label_ticks(axes, rows, columns, layout)
    _annotate(axes, image, table, layout.cell)
    axes.set_title(_literal(layout.title), fontsize=_FONT + 2, loc="left")
    if path is not None:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return figure


class _Layout(NamedTuple):
    """Sizes in inches: of the figure and of a cell, each across and down."""

    size: tuple[float, float]
    cell: tuple[float, float]
    title: str
    upright: bool  # the columns' labels


def _plan(rows: Sequence[str], columns: Sequence[str], title: str) -> _Layout:
    """Room for the cells and for all that is written around them."""
    letter, line = _LETTER
    counts = (len(columns), len(rows))
    width, height = (
        max(min(n * cell, most), least) for n, cell, most, least in zip(counts, _CELL, _LARGEST, _LEAST, strict=True)
    )
    upright = _longest(columns) * letter > width / len(columns)
    below = letter * _longest(columns) if upright else line * _lines(columns)
    beside = letter * _longest(rows) + 1.3  # the colour bar
    title = _wrap(title, round((width + beside) / letter * 0.7))
    size = (width + beside, height + below + 1.4 * line * _lines([title]) + 0.4)
    return _Layout(size, (width / len(columns), height / len(rows)), title, upright)


def _import_figure() -> type[Figure]:
    try:
        from ._figure import ShownFigure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "nnsight[plots]"') from error
    return ShownFigure


def _draw_cells(axes: Axes, table: torch.Tensor) -> AxesImage:
    from matplotlib import colormaps

    known = table[table.isfinite()]
    low, high = (known.min().item(), known.max().item()) if known.numel() else (0.0, 1.0)
    name = "viridis"
    if low < 0 < high:
        name, high = "PuOr_r", max(-low, high)
        low = -high
    elif low == high:
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    colours = colormaps[name].with_extremes(bad="0.85")
    return axes.imshow(table.numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")


def _label_ticks(axes: Axes, rows: Sequence[str], columns: Sequence[str], layout: _Layout) -> None:
    """Name every row and column, or every few where the names would overlap."""
    line = _LETTER[1]
    needed = (line * _lines(columns) if layout.upright else 0.0, line * _lines(rows))
    sides = zip((axes.xaxis, axes.yaxis), (columns, rows), layout.cell, needed, strict=True)
    for axis, names, size, room in sides:
        step = max(math.ceil(room / size), 1)
        axis.set_ticks(range(0, len(names), step), [_literal(name) for name in names[::step]], fontsize=_FONT)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", rotation=90 if layout.upright else 0)


def _annotate(axes: Axes, image: AxesImage, table: torch.Tensor, cell: tuple[float, float]) -> None:
    """Write the numbers into the cells, unless one of them would not fit."""
    digits = _digits(table)
    texts = [[f"{value:.{digits}f}" for value in row] for row in table.tolist()]
    letter, line = _LETTER
    if max(len(text) for row in texts for text in row) * letter > cell[0] or line > cell[1]:
        return
    colours = image.to_rgba(table.numpy())
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if table[i, j].isfinite():
                red, green, blue, _ = colours[i, j]
                ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
                axes.text(j, i, text, ha="center", va="center", fontsize=_FONT - 1, color=ink)


def _digits(table: torch.Tensor) -> int:
    """Decimals that show two digits of the largest number."""
    largest = table[table.isfinite()].abs().max().item() if table.isfinite().any() else 0.0
    return 2 if largest == 0 else min(max(2 - math.ceil(math.log10(largest)), 0), 9)


def _longest(names: Sequence[str]) -> int:
    return max(len(part) for name in names for part in name.split("\n"))


def _lines(names: Sequence[str]) -> int:
    return max(name.count("\n") + 1 for name in names)


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def _literal(text: str) -> str:
    return text.replace("$", r"\$")  # else matplotlib reads what stands between two of them as a formula
