"""Cells: a table of numbers as colours on given axes, with texts in the cells where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ._labels import FONT, LETTER, digits, lines, literal, longest, wrap
from ._theme import Scale, Theme, ink_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

# In inches.
CELL = (0.55, 0.34)  # of a small table; larger ones get narrower cells
_LARGEST = (14.0, 10.0)  # the cells of a table together
_LEAST = (2.5, 1.2)


class Layout(NamedTuple):
    """Sizes in inches: of the figure and of a cell, each across and down."""

    size: tuple[float, float]
    cell: tuple[float, float]
    title: str


def plan(
    rows: Sequence[str], columns: Sequence[str], title: str, cell: tuple[float, float] = CELL, *, most: float = 0.0
) -> Layout:
    """Room for the cells, of `cell` inches where they may be that large, and for all that is written around them."""
    letter, line = LETTER
    largest = (most or _LARGEST[0], _LARGEST[1])
    width, height = (
        max(min(n * wanted, limit), least)
        for n, wanted, limit, least in zip((len(columns), len(rows)), cell, largest, _LEAST, strict=True)
    )
    upright = longest(columns) * letter > width / len(columns)
    below = letter * longest(columns) if upright else line * lines(columns)
    beside = letter * longest(rows) + 1.3  # the colour bar
    title = wrap(title, round((width + beside) / letter * 0.7))
    size = (width + beside, height + below + 1.4 * line * lines([title]) + 0.4)
    return Layout(size, (width / len(columns), height / len(rows)), title)


def draw_cells(axes: Axes, table: torch.Tensor, scale: Scale, theme: Theme) -> AxesImage:
    """Colour the cells, with a hair of paper between them where they are not too many."""
    colours = scale.colours(theme)
    image = axes.imshow(
        table.numpy(), cmap=colours, vmin=scale.low, vmax=scale.high, aspect="auto", interpolation="nearest"
    )
    if max(table.shape) <= 60:
        axes.set_xticks([i - 0.5 for i in range(1, table.shape[1])], minor=True)
        axes.set_yticks([i - 0.5 for i in range(1, table.shape[0])], minor=True)
        axes.grid(which="minor", color=theme.paper, linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    return image


def write_in_cells(
    axes: Axes, image: AxesImage, table: torch.Tensor, texts: Sequence[Sequence[str]], size: float
) -> None:
    """Write a text into each cell that has a number, in ink that is read on its colour."""
    colours = image.to_rgba(table.numpy())
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if table[i, j].isfinite():
                ink = ink_on(colours[i, j])
                axes.text(j, i, literal(text), ha="center", va="center", fontsize=size, color=ink, clip_on=True)


def write_numbers(axes: Axes, image: AxesImage, table: torch.Tensor, cell: tuple[float, float]) -> None:
    """Write the numbers into the cells, unless one of them would not fit."""
    decimals = digits(table)
    texts = [[f"{value:.{decimals}f}" for value in row] for row in table.tolist()]
    letter, line = LETTER
    if max(len(text) for row in texts for text in row) * letter <= cell[0] and line <= cell[1]:
        write_in_cells(axes, image, table, texts, FONT - 1)
