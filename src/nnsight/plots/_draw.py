"""What every figure has: its making, its colour bar and its file."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._labels import FONT, literal
from ._page import Page
from ._theme import Theme

if TYPE_CHECKING:
    from matplotlib.image import AxesImage

    from ._figure import ShownFigure


def new_figure(size: tuple[float, float], theme: Theme, page: Callable[[], Page]) -> ShownFigure:
    """An empty figure of `size` inches, with the page that belongs to it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from ._figure import make_figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "nnsight[plots]"') from error
    return make_figure(size, theme, page())


def add_bar(figure: ShownFigure, image: AxesImage, axes: Any, label: str, **options: Any) -> None:
    """Show which colour is which number, beside the axes."""
    theme = figure.theme
    bar = figure.colorbar(image, ax=axes, label=literal(label), **{"pad": 0.02, **options})
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=FONT - 1, length=2)
    bar.ax.yaxis.label.set_color(theme.ink)


def finish(figure: ShownFigure, path: str | os.PathLike[str] | None) -> ShownFigure:
    """Write the figure where it is wanted."""
    if path is not None:
        figure.save(path)
    return figure
