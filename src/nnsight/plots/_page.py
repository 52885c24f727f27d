"""Page: a figure for the browser, in one file that asks nothing of the network."""

from __future__ import annotations

import html
import json
import math
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch


class Page:
    """A figure as HTML; a notebook shows it in a frame of its own.

    The styles, the script and the numbers are all in the text, so that the file can be sent and opened anywhere.

    Example:
        >>> from nnsight.plots import heatmap
        >>> page = heatmap([[0.1, 0.9]], rows=["layer 0"], columns=["The", "city"]).interactive()
        >>> page.save("grid.html")
        >>> page.html[:15]
        '<!doctype html>'
    """

    def __init__(self, kind: str, data: dict[str, Any], *, title: str, theme: str | None, height: int) -> None:
        self._kind = kind
        self._data = data
        self._title = title
        self._theme = theme
        self._height = height

    @property
    def html(self) -> str:
        """The whole page."""
        data = json.dumps({"kind": self._kind, "title": self._title, **_plain(self._data)}, ensure_ascii=False)
        parts = {
            "title": html.escape(self._title or self._kind),
            "theme": f' data-theme="{self._theme}"' if self._theme else "",
            "style": _asset("page.css"),
            "script": _asset("page.js") + _asset("grid.js") + _asset(f"{self._kind}.js"),
            # What ends a script element, or begins a comment in it, must not stand in the data.
            "data": data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
        }
        return _FRAME.format(**parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file."""
        Path(path).write_text(self.html, "utf-8")

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" '
            f'style="width:100%;height:{self._height}px;border:0"></iframe>'
        )


_FRAME = """\
<!doctype html>
<html lang="en"{theme}>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main id="page"></main>
<script>
"use strict";
const DATA = {data};
{script}
show(DATA);
</script>
</body>
</html>
"""


@cache
def _asset(name: str) -> str:
    return (resources.files("nnsight.plots") / "_assets" / name).read_text("utf-8")


def _plain(value: Any) -> Any:
    """The value in what JSON has; numbers that are not finite are null, and six digits are enough."""
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
