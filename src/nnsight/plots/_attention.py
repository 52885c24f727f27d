"""attention: the patterns of many heads, one small picture each."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ._cells import draw_cells
from ._draw import add_bar, finish, new_figure
from ._labels import FONT, LETTER, as_table, label_ticks, literal, longest, paint, visible, wrap
from ._page import Page
from ._theme import Scale, ThemeName, theme_of

if TYPE_CHECKING:
    from ._figure import ShownFigure

# In inches.
_TOKEN = 0.16
_SIDES = (1.3, 5.0)  # of one head's picture
_WIDTH = 16.0  # of the pictures together
_MOST_LABELS = 40


def attention(
    patterns: Any,
    *,
    tokens: Sequence[str],
    key_tokens: Sequence[str] | None = None,
    heads: Sequence[str] | None = None,
    title: str = "",
    path: str | os.PathLike[str] | None = None,
    theme: ThemeName | None = None,
) -> ShownFigure:
    """Draw the attention patterns of some heads: from each token (a row) to each token (a column).

    Example:
        >>> import torch
        >>> from nnsight.plots import attention
        >>> figure = attention(torch.eye(3).repeat(4, 1, 1), tokens=["The", " Eiffel", " Tower"])
        >>> figure.save("heads.html")

    Args:
        patterns: Probabilities `[head, query, key]`, or `[query, key]` of one head. NaN leaves a cell grey.
        tokens: The tokens that attend, a label for each query.
        key_tokens: The tokens attended to, where they are others.
        heads: A label for each head; by default `head 0`, `head 1`, ….
        title: What the figure shows.
        path: A file to write too; its ending names the format, and `.html` is the interactive page.
        theme: `"light"` or `"dark"`, as for `heatmap`.

    Returns:
        The figure; `.interactive()` is the page, where a click shows a head with its labels.

    Raises:
        ValueError: The patterns and the labels do not match.
        ImportError: matplotlib is not installed.
    """
    table = as_table(patterns)
    table = table.unsqueeze(0) if table.dim() == 2 else table
    queries = [visible(token) for token in tokens]
    keys = queries if key_tokens is None else [visible(token) for token in key_tokens]
    names = [f"head {i}" for i in range(len(table))] if heads is None else list(heads)
    if table.shape != (len(names), len(queries), len(keys)) or not table.numel():
        raise ValueError(
            f"Attention of {len(names)} heads from {len(queries)} to {len(keys)} tokens has the shape "
            f"[{len(names)}, {len(queries)}, {len(keys)}]; this is {list(table.shape)}."
        )
    colours = theme_of(theme)
    scale = Scale("amount", 0.0, _highest(table))
    cell, across = _arrange(names, queries, keys)
    down = math.ceil(len(names) / across)
    beside, below = LETTER[0] * longest(queries) + 1.0, LETTER[0] * longest(keys) + 0.4
    size = (
        across * (cell * len(keys) + 0.12) + beside,
        down * (cell * len(queries) + 0.36) + below + (0.4 if title else 0.0),
    )
    data = {"patterns": table, "queries": queries, "keys": keys, "heads": names}
    figure = new_figure(
        size,
        colours,
        lambda: Page("attention", {**data, "scale": scale.as_data()}, title=title, theme=theme, height=640),
    )
    grid = figure.subplots(down, across, squeeze=False)
    image = None
    for index, axes in enumerate(grid.flat):
        if index >= len(names):
            axes.set_visible(False)
            continue
        paint(axes, colours, frame=True)
        image = draw_cells(axes, table[index], scale, colours)
        axes.grid(visible=False, which="minor")
        axes.set_title(literal(names[index]), fontsize=FONT, color=colours.ink, pad=3)
        last = index + across >= len(names)
        label_ticks(axes, queries, keys, (cell, cell))
        axes.tick_params(labelbottom=last, labelleft=index % across == 0)
    assert image is not None
    add_bar(figure, image, list(grid.flat), "attention", shrink=min(2.2 / size[1] + 0.15, 0.8), aspect=18)
    if title:
        width = round(size[0] / LETTER[0] * 0.8)
        figure.suptitle(literal(wrap(title, width)), fontsize=FONT + 2, x=0.01, ha="left", color=colours.ink)
    return finish(figure, path)


def _highest(table: torch.Tensor) -> float:
    known = table[table.isfinite()]
    return max(known.max().item(), 1e-9) if known.numel() else 1.0


def _arrange(names: Sequence[str], queries: Sequence[str], keys: Sequence[str]) -> tuple[float, int]:
    """The side of a token in inches, and how many heads stand side by side."""
    most = max(len(queries), len(keys))
    side = min(max(min(most, _MOST_LABELS) * _TOKEN, _SIDES[0]), _SIDES[1])
    if len(names) == 1:
        side = max(side, 3.0)
    fitting = max(math.floor(_WIDTH / side), 1)
    return side / most, math.ceil(len(names) / math.ceil(len(names) / fitting))
