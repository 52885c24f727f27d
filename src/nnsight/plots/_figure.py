"""ShownFigure: a figure that a notebook shows, without pyplot and so without any window or global state."""

from __future__ import annotations

import io
import os
from typing import Any

from matplotlib.figure import Figure

from ._labels import FONT, literal
from ._page import Page
from ._theme import Theme


class ShownFigure(Figure):
    """A `matplotlib` figure that IPython displays, and that has a page for a browser too.

    Example:
        >>> from nnsight.plots import heatmap
        >>> figure = heatmap([[0.1, 0.9]], rows=["layer 0"], columns=["The", "city"])
        >>> figure.save("grid.html")  # or grid.png, grid.pdf, grid.svg
    """

    page: Page
    theme: Theme

    def interactive(self) -> Page:
        """The same as a page to explore in a browser: details under the pointer, light and dark."""
        return self.page

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file; its ending names the format, and `.html` is the interactive page."""
        if str(path).endswith((".html", ".htm")):
            self.page.save(path)
        else:
            self.savefig(path, dpi=150, bbox_inches="tight")

    def set_title(self, axes: Any, title: str) -> None:
        """Write `title` above the axes, from the left."""
        axes.set_title(literal(title), fontsize=FONT + 2, loc="left", color=self.theme.ink)

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", bbox_inches="tight")
        return picture.getvalue()


def make_figure(size: tuple[float, float], theme: Theme, page: Page) -> ShownFigure:
    """An empty figure of `size` inches."""
    figure = ShownFigure(figsize=size, layout="constrained", facecolor=theme.paper)
    figure.page, figure.theme = page, theme
    return figure
