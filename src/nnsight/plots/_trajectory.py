"""trajectory: the path of representations through the layers, on their two principal axes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ._draw import finish, new_figure
from ._labels import FONT, as_table, literal, paint, visible
from ._page import Page
from ._theme import THEMES, Theme, ThemeName, theme_of

if TYPE_CHECKING:
    from ._figure import ShownFigure


class _Plane(NamedTuple):
    points: torch.Tensor  # [path, step, 2]
    axes: tuple[str, str]


def trajectory(
    states: Any,
    *,
    labels: Sequence[str],
    steps: Sequence[str] | None = None,
    normalize: bool = False,
    title: str = "",
    path: str | os.PathLike[str] | None = None,
    theme: ThemeName | None = None,
) -> ShownFigure:
    """Draw how representations move through the layers, projected on the two directions of largest variance (PCA).

    Example:
        >>> import torch
        >>> from nnsight.plots import trajectory
        >>> figure = trajectory(torch.randn(2, 6, 32).cumsum(1), labels=["Paris", "Rome"])
        >>> figure.save("path.html")

    Args:
        states: Vectors `[path, layer, d]`, or `[layer, d]` of one path.
        labels: A label for each path.
        steps: A label for each layer; by default `layer 0`, `layer 1`, ….
        normalize: Give each vector length 1 first, so that the growth of the stream's norm does not hide the rest.
        title: What the figure shows.
        path: A file to write too; its ending names the format, and `.html` is the interactive page.
        theme: `"light"` or `"dark"`, as for `heatmap`.

    Returns:
        The figure; `.interactive()` is the page.

    Raises:
        ValueError: The vectors and labels do not match, or are not finite.
        ImportError: matplotlib is not installed.
    """
    table = as_table(states)
    table = table.unsqueeze(0) if table.dim() == 2 else table
    if table.dim() != 3 or not table.numel() or not table.isfinite().all():
        raise ValueError(f"Paths are finite vectors [path, layer, d], at least one; these are {list(table.shape)}.")
    names = [visible(name) for name in labels]
    marks = [f"layer {i}" for i in range(table.shape[1])] if steps is None else list(steps)
    if (len(names), len(marks)) != tuple(table.shape[:2]):
        raise ValueError(
            f"{table.shape[0]} paths of {table.shape[1]} steps need as many labels; there are {len(names)} and {len(marks)}."
        )
    plane = _project(torch.nn.functional.normalize(table, dim=-1) if normalize else table)
    colours = theme_of(theme)
    data = {
        "points": plane.points,
        "axes": plane.axes,
        "labels": names,
        "steps": marks,
        "series": {name: found.series for name, found in THEMES.items()},
    }
    figure = new_figure((7.6, 5.2), colours, lambda: Page("trajectory", data, title=title, theme=theme, height=720))
    axes = figure.subplots()
    paint(axes, colours)
    axes.margins(0.12)
    axes.tick_params(labelsize=FONT - 1, length=0)
    axes.grid(color=colours.line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(plane.axes[0], fontsize=FONT, color=colours.muted)
    axes.set_ylabel(plane.axes[1], fontsize=FONT, color=colours.muted)
    for index, name in enumerate(names):
        _draw_path(axes, plane.points[index], name, marks, index, colours)
    figure.set_title(axes, title)
    return finish(figure, path)


def _project(table: torch.Tensor) -> _Plane:
    """The first two principal components of all vectors together, and their shares of the variance."""
    flat = table.flatten(0, 1)
    centred = flat - flat.mean(0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    # A component's sign is arbitrary: its largest entry is made positive, so that the same data give the same picture.
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    points = centred @ (directions * signs).T
    points = torch.nn.functional.pad(points, (0, 2 - points.shape[1])).unflatten(0, table.shape[:2])
    shares = [*(sizes**2 / (sizes**2).sum().clamp_min(1e-300)).tolist(), 0.0, 0.0]
    return _Plane(points, (f"component 1 ({shares[0]:.0%} of variance)", f"component 2 ({shares[1]:.0%})"))


def _draw_path(axes: Any, points: torch.Tensor, name: str, marks: Sequence[str], index: int, colours: Theme) -> None:
    from matplotlib.patheffects import withStroke

    colour = colours.series[index % len(colours.series)]
    dashes = "-" if index < len(colours.series) else "--"
    x, y = points.T.tolist()
    axes.plot(x, y, dashes, color=colour, linewidth=1.4, alpha=0.8)
    axes.scatter(x[1:-1], y[1:-1], s=12, color=colour, zorder=3)
    axes.scatter(x[:1], y[:1], s=30, facecolor=colours.paper, edgecolor=colour, linewidth=1.4, zorder=3)
    axes.scatter(x[-1:], y[-1:], s=44, color=colour, zorder=4)
    halo = [withStroke(linewidth=2.5, foreground=colours.paper)]
    place = {"textcoords": "offset points", "fontsize": FONT, "color": colours.ink, "path_effects": halo, "zorder": 5}
    axes.annotate(literal(name), (x[-1], y[-1]), xytext=(7, 4), **place)
    if index == 0 and len(x) > 1:
        axes.annotate(literal(marks[0]), (x[0], y[0]), xytext=(7, -9), **{**place, "color": colours.muted})
