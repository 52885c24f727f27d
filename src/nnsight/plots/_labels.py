"""Labels: how much room texts take, and how they are put along an axis."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ._theme import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In inches.
LETTER = (0.075, 0.13)  # of tick labels and annotations, as drawn at FONT points
FONT = 9


def as_table(values: object) -> torch.Tensor:
    """Numbers of any kind as float64 on the CPU."""
    return torch.as_tensor(values).detach().to("cpu", torch.float64)


def label_ticks(axes: Axes, rows: Sequence[str], columns: Sequence[str], cell: tuple[float, float]) -> None:
    """Name every row and column, or every few where the names would overlap."""
    letter, line = LETTER
    upright = longest(columns) * letter > cell[0]
    needed = (line * lines(columns) if upright else 0.0, line * lines(rows))
    for axis, names, size, room in zip((axes.xaxis, axes.yaxis), (columns, rows), cell, needed, strict=True):
        step = max(math.ceil(room / size), 1)
        axis.set_ticks(range(0, len(names), step), [literal(name) for name in names[::step]], fontsize=FONT)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", rotation=90 if upright else 0)


def paint(axes: Axes, theme: Theme, *, frame: bool = False) -> None:
    """Give axes the colours of a theme."""
    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.muted, labelcolor=theme.ink)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.ink)
    for side in axes.spines.values():
        side.set_visible(frame)
        side.set_edgecolor(theme.line)


def longest(names: Sequence[str]) -> int:
    """Letters of the longest line."""
    return max((len(part) for name in names for part in name.split("\n")), default=0)


def lines(names: Sequence[str]) -> int:
    """Lines of the name that has most."""
    return max((name.count("\n") + 1 for name in names), default=1)


def wrap(text: str, width: int) -> str:
    """The text in lines of at most `width` letters."""
    return "\n".join(textwrap.fill(line, max(width, 8)) for line in text.split("\n"))


def visible(token: str) -> str:
    """A token with its line ends and tabs shown, since a label has one line."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")


def literal(text: str) -> str:
    """The text as it is: matplotlib would read what stands between two dollar signs as a formula."""
    return text.replace("$", r"\$")


def digits(table: torch.Tensor) -> int:
    """Decimals that show two digits of the largest number."""
    finite = table[table.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return 2 if largest == 0 else min(max(2 - math.ceil(math.log10(largest)), 0), 9)
