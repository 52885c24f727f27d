"""lens_grid: the token that each layer would predict at each position, on the colour of its probability."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._cells import CELL, draw_cells, plan, write_in_cells
from ._draw import add_bar, finish, new_figure
from ._labels import FONT, LETTER, as_table, label_ticks, longest, paint, visible
from ._page import Page
from ._theme import Scale, ThemeName, theme_of

if TYPE_CHECKING:
    from ._figure import ShownFigure

_WIDEST = 10  # letters of a token in a cell; longer ones are cut, and whole in the page


def lens_grid(
    tokens: Sequence[Sequence[str]],
    values: Any,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    details: Sequence[Sequence[Sequence[tuple[str, float]]]] | None = None,
    title: str = "",
    value_label: str = "probability",
    path: str | os.PathLike[str] | None = None,
    theme: ThemeName | None = None,
) -> ShownFigure:
    """Draw what a lens reads at each layer and position: a token, on the colour of a number.

    Example:
        >>> from nnsight.plots import lens_grid
        >>> figure = lens_grid([[" the", " of"], [" Eiffel", " Paris"]], [[0.1, 0.2], [0.3, 0.9]],
        ...     rows=["layer 0", "layer 1"], columns=["The", " in"])
        >>> figure.save("lens.html")

    Args:
        tokens: The token of each cell `[row, column]`.
        values: The number of each cell `[row, column]`: from 0 to 1 for probabilities, else of any range.
        rows: A label for each row, from the top.
        columns: A label for each column: the prompt's tokens.
        details: For the page, more tokens of each cell with their numbers, `[row][column][(token, number), …]`.
        title: What the figure shows.
        value_label: What the numbers are.
        path: A file to write too; its ending names the format, and `.html` is the interactive page.
        theme: `"light"` or `"dark"`, as for `heatmap`.

    Returns:
        The figure; `.interactive()` is the page.

    Raises:
        ValueError: The tokens, the numbers and the labels do not match.
        ImportError: matplotlib is not installed.
    """
    table = as_table(values)
    shape = (len(rows), len(columns))
    if table.shape != shape or not table.numel() or [len(row) for row in tokens] != [shape[1]] * shape[0]:
        raise ValueError(
            f"A lens grid of {shape[0]} rows and {shape[1]} columns needs as many tokens and numbers; the numbers are "
            f"{list(table.shape)}, the tokens {[len(row) for row in tokens]} a row."
        )
    rows, columns = [visible(name) for name in rows], [visible(name) for name in columns]
    texts = [[visible(token) for token in row] for row in tokens]
    scale = _scale(table)
    shown = [[_cut(token.strip()) for token in row] for row in texts]
    needed = max(longest([*row]) for row in shown) * LETTER[0] * 0.92 + 0.1
    colours = theme_of(theme)
    layout = plan(rows, columns, title, (max(CELL[0], needed), CELL[1] * 0.8), most=needed * len(columns))
    data = {"rows": rows, "columns": columns, "tokens": texts, "values": table, "details": details}
    figure = new_figure(
        layout.size,
        colours,
        lambda: Page(
            "lens",
            {**data, "scale": scale.as_data(), "label": value_label},
            title=title,
            theme=theme,
            height=min(140 + 27 * len(rows), 700),
        ),
    )
    axes = figure.subplots()
    paint(axes, colours)
    image = draw_cells(axes, table, scale, colours)
    add_bar(figure, image, axes, value_label)
    label_ticks(axes, rows, columns, layout.cell)
    write_in_cells(axes, image, table, shown, FONT - 1)
    figure.set_title(axes, layout.title)
    return finish(figure, path)


def _scale(table: Any) -> Scale:
    known = table[table.isfinite()]
    low, high = (known.min().item(), known.max().item()) if known.numel() else (0.0, 1.0)
    return Scale("amount", 0.0, 1.0) if low >= 0 and high <= 1 else Scale("amount", low, high)


def _cut(token: str) -> str:
    return token if len(token) <= _WIDEST else token[: _WIDEST - 1] + "…"
