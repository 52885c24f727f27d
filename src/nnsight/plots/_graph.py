"""graph: which node feeds which, from the top down, with edges as strong as their weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ._draw import finish, new_figure
from ._labels import FONT, literal, paint, visible, wrap
from ._layered import Point, place
from ._page import Page
from ._theme import Theme, ThemeName, theme_of

if TYPE_CHECKING:
    from ._figure import ShownFigure

# In points of the page; the picture has 96 of them to the inch.
_LETTER, _BOX, _RANK = 7.2, 26.0, 58.0
_DOTS = 96.0


def graph(
    nodes: Sequence[str] | Mapping[str, str],
    edges: Sequence[tuple[str, str] | tuple[str, str, float]],
    *,
    details: Mapping[str, str] | None = None,
    title: str = "",
    value_label: str = "weight",
    path: str | os.PathLike[str] | None = None,
    theme: ThemeName | None = None,
) -> ShownFigure:
    """Draw a graph without circles from the top down; edges get as wide as their weights, negative ones dashed.

    Example:
        >>> from nnsight.plots import graph
        >>> figure = graph(["embed", "attn", "mlp"], [("embed", "attn", 1.0), ("attn", "mlp", -0.2), ("embed", "mlp", 0.5)])
        >>> figure.save("graph.html")

    Args:
        nodes: The nodes' names, or a label for each name.
        edges: Pairs of names `(source, target)`, or with a weight.
        details: For the page, a text for some of the nodes.
        title: What the figure shows.
        value_label: What the weights are.
        path: A file to write too; its ending names the format, and `.html` is the interactive page.
        theme: `"light"` or `"dark"`, as for `heatmap`.

    Returns:
        The figure; `.interactive()` is the page, where weak edges can be hidden.

    Raises:
        ValueError: An edge names an unknown node or comes twice, or the edges go in a circle.
        ImportError: matplotlib is not installed.
    """
    named = nodes if isinstance(nodes, Mapping) else {name: name for name in nodes}
    labels = {name: visible(label) for name, label in named.items()}
    weights = _weights(labels, edges)
    widths = {name: max(len(label), 2) * _LETTER + 18 for name, label in labels.items()}
    places, routes, (width, height) = place(widths, list(weights), _RANK)
    colours = theme_of(theme)
    data = {
        "size": [round(width), round(height)],
        "weighted": any(len(edge) > 2 for edge in edges),
        "label": value_label,
        "nodes": [
            {"name": name, "label": labels[name], "x": x, "y": y, "width": widths[name], "height": _BOX}
            | {"detail": (details or {}).get(name, "")}
            for name, (x, y) in places.items()
        ],
        "edges": [
            {"source": s, "target": t, "weight": weight, "path": _svg(_curve(routes[s, t]))}
            for (s, t), weight in weights.items()
        ],
    }
    size = (max(width / _DOTS, 2.5), height / _DOTS + (0.4 if title else 0.0))
    page = Page("graph", data, title=title, theme=theme, height=round(min(height + 150, 800)))
    figure = new_figure(size, colours, lambda: page)
    axes = figure.subplots()
    paint(axes, colours)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")
    strongest = max((abs(weight) for weight in weights.values()), default=1.0) or 1.0
    for edge, weight in weights.items():
        _draw_edge(axes, _curve(routes[edge]), weight / strongest, colours)
    for name, middle in places.items():
        _draw_box(axes, middle, widths[name], labels[name], colours)
    if title:
        figure.set_title(axes, wrap(title, round(size[0] / 0.075)))
    return finish(figure, path)


def _weights(labels: Mapping[str, str], edges: Sequence[tuple[Any, ...]]) -> dict[tuple[str, str], float]:
    weights: dict[tuple[str, str], float] = {}
    for source, target, *weight in edges:
        for name in (source, target):
            if name not in labels:
                raise ValueError(f"The edge from {source!r} to {target!r} names {name!r}, which is no node.")
        if (source, target) in weights:
            raise ValueError(f"There are two edges from {source!r} to {target!r}: add their weights up.")
        weights[source, target] = float(weight[0]) if weight else 1.0
    if not labels:
        raise ValueError("A graph has at least one node.")
    return weights


def _curve(route: Sequence[Point]) -> list[Point]:
    """Control points of cubic curves from box to box, upright where they meet the ranks."""
    (x0, y0), (x1, y1) = route[0], route[-1]
    stops = [(x0, y0 + _BOX / 2), *route[1:-1], (x1, y1 - _BOX / 2)]
    points = [stops[0]]
    for (left, top), (right, bottom) in pairwise(stops):
        half = (top + bottom) / 2
        points += [(left, half), (right, half), (right, bottom)]
    return points


def _svg(points: Sequence[Point]) -> str:
    start, *rest = [f"{x:.1f},{y:.1f}" for x, y in points]
    return f"M{start}C" + " ".join(rest)


def _draw_edge(axes: Any, points: Sequence[Point], share: float, colours: Theme) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    codes = [Path.MOVETO, *[Path.CURVE4] * (len(points) - 1)]
    size = abs(share)
    axes.add_patch(
        PathPatch(
            Path(points, codes),
            fill=False,
            edgecolor=colours.series[0] if share >= 0 else colours.series[1],
            linestyle="-" if share >= 0 else (0, (4, 3)),
            linewidth=0.6 + 2.6 * size,
            alpha=0.25 + 0.7 * size,
            capstyle="round",
        )
    )


def _draw_box(axes: Any, middle: Point, width: float, label: str, colours: Theme) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = middle
    style = "round,pad=0,rounding_size=6"
    corner = (x - width / 2, y - _BOX / 2)
    axes.add_patch(
        FancyBboxPatch(corner, width, _BOX, boxstyle=style, facecolor=colours.paper, edgecolor=colours.muted, zorder=2)
    )
    axes.text(x, y, literal(label), ha="center", va="center", fontsize=FONT, color=colours.ink, zorder=3)
