"""tokens: a text whose tokens have the colours of their numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ._draw import add_bar, finish, new_figure
from ._labels import FONT, as_table, literal, paint, visible, wrap
from ._page import Page
from ._theme import Scale, ThemeName, ink_on, scale_of, theme_of

if TYPE_CHECKING:
    from ._figure import ShownFigure

# In inches.
_LETTER, _LINE, _GAP = 0.092, 0.36, 0.03
_WIDTH = 8.5


class _Box(NamedTuple):
    left: float
    top: float
    width: float
    text: str


def tokens(
    words: Sequence[str],
    values: Any,
    *,
    title: str = "",
    value_label: str = "",
    path: str | os.PathLike[str] | None = None,
    theme: ThemeName | None = None,
) -> ShownFigure:
    """Write a text, each token on the colour of its number.

    Example:
        >>> from nnsight.plots import tokens
        >>> figure = tokens(["The", " Eiffel", " Tower"], [0.1, 2.0, -0.7], value_label="attribution")
        >>> figure.save("tokens.html")

    Args:
        words: The tokens, with their spaces.
        values: A number for each token `[token]`. NaN leaves a token grey.
        title: What the figure shows.
        value_label: What the numbers are.
        path: A file to write too; its ending names the format, and `.html` is the interactive page.
        theme: `"light"` or `"dark"`, as for `heatmap`.

    Returns:
        The figure; `.interactive()` is the page.

    Raises:
        ValueError: There are not as many numbers as tokens.
        ImportError: matplotlib is not installed.
    """
    table = as_table(values)
    if table.shape != (len(words),) or not len(words):
        raise ValueError(f"{len(words)} tokens need as many numbers, at least one; these are {list(table.shape)}.")
    colours, scale = theme_of(theme), scale_of(table)
    scale = Scale("amount", min(scale.low, 0.0), scale.high) if scale.kind == "even" and scale.low >= 0 else scale
    boxes, height = _flow(words)
    width = max(max(box.left + box.width for box in boxes), 3.0)
    size = (width + 1.1, max(height, 0.9) + (0.4 if title else 0.0) + 0.2)
    data = {"tokens": list(words), "values": table, "scale": scale.as_data(), "label": value_label}
    figure = new_figure(
        size, colours, lambda: Page("tokens", data, title=title, theme=theme, height=round(150 + 60 * height))
    )
    axes = figure.subplots()
    paint(axes, colours)
    axes.set(xlim=(0, width), ylim=(max(height, 0.9), 0), xticks=[], yticks=[])
    image = axes.imshow(
        table.unsqueeze(0).numpy(), cmap=scale.colours(colours), vmin=scale.low, vmax=scale.high, extent=(0, 0, 0, 0)
    )
    axes.set(xlim=(0, width), ylim=(max(height, 0.9), 0), aspect="auto")
    for box, colour in zip(boxes, image.to_rgba(table.numpy()), strict=True):
        _draw(axes, box, colour)
    add_bar(figure, image, axes, value_label, shrink=0.9, aspect=12)
    if title:
        figure.set_title(axes, wrap(title, round(width / 0.07)))
    return finish(figure, path)


def _flow(words: Sequence[str]) -> tuple[list[_Box], float]:
    """Where each token stands, and the height of all: lines are broken between tokens, and after a line's end."""
    boxes, left, top = [], 0.0, 0.0
    for word in words:
        text = visible(word)
        width = _LETTER * max(len(text), 1) + 0.02
        if left and left + width > _WIDTH:
            left, top = 0.0, top + _LINE
        boxes.append(_Box(left, top, width, text))
        left += width + _GAP
        if word.endswith("\n"):
            left, top = 0.0, top + _LINE
    return boxes, boxes[-1].top + _LINE


def _draw(axes: Any, box: _Box, colour: Any) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.045"
    place = (box.left, box.top + 0.04)
    axes.add_patch(FancyBboxPatch(place, box.width, _LINE - 0.09, boxstyle=style, facecolor=colour, edgecolor="none"))
    middle = box.left + box.width / 2, box.top + _LINE / 2
    axes.text(
        *middle,
        literal(box.text),
        ha="center",
        va="center",
        fontsize=FONT + 1,
        family="monospace",
        color=ink_on(colour),
    )
