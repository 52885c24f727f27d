"""heatmap: a table of numbers as colours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._cells import draw_cells, plan, write_numbers
from ._draw import add_bar, finish, new_figure
from ._labels import as_table, label_ticks, paint, visible
from ._page import Page
from ._theme import ThemeName, scale_of, theme_of

if TYPE_CHECKING:
    from ._figure import ShownFigure


def heatmap(
    values: Any,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    value_label: str = "",
    path: str | os.PathLike[str] | None = None,
    theme: ThemeName | None = None,
) -> ShownFigure:
    """Draw a table of numbers as colours, with each number in its cell where there is room.

    Numbers of one sign get a scale of even lightness; those of both signs one that is nearest to the paper at zero.
    Both can be read by people who are colour-blind. No window is ever opened.

    Example:
        >>> from nnsight.plots import heatmap
        >>> figure = heatmap([[0.1, 0.9], [0.4, 0.2]], rows=["layer 0", "layer 1"], columns=["The", "city"])
        >>> figure.save("grid.png")
        >>> figure.save("grid.html")

    Args:
        values: Numbers `[row, column]`: a tensor, an array or lists. NaN leaves a cell grey.
        rows: A label for each row, from the top.
        columns: A label for each column.
        title: What the figure shows.
        value_label: What the numbers are, with their unit.
        path: A file to write too; its ending names the format, and `.html` is the interactive page.
        theme: `"light"` or `"dark"`; without it, the picture is light and the page follows the reader's system.

    Returns:
        The figure, a `matplotlib.figure.Figure`; `.interactive()` is the page.

    Raises:
        ValueError: There are not as many labels as rows or columns.
        ImportError: matplotlib is not installed.
    """
    table = as_table(values)
    if table.shape != (len(rows), len(columns)) or not table.numel():
        raise ValueError(
            f"A heat map of {len(rows)} rows and {len(columns)} columns needs values of shape "
            f"[{len(rows)}, {len(columns)}], at least one; these are {list(table.shape)}."
        )
    rows, columns = [visible(name) for name in rows], [visible(name) for name in columns]
    colours, scale, layout = theme_of(theme), scale_of(table), plan(rows, columns, title)
    figure = new_figure(
        layout.size,
        colours,
        lambda: Page(
            "heatmap",
            {"rows": rows, "columns": columns, "values": table, "scale": scale.as_data(), "label": value_label},
            title=title,
            theme=theme,
            height=min(140 + 26 * len(rows), 700),
        ),
    )
    axes = figure.subplots()
    paint(axes, colours)
    image = draw_cells(axes, table, scale, colours)
    add_bar(figure, image, axes, value_label)
    label_ticks(axes, rows, columns, layout.cell)
    write_numbers(axes, image, table, layout.cell)
    figure.set_title(axes, layout.title)
    return finish(figure, path)
