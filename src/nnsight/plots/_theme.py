"""Theme: the colours of a figure, light and dark, told apart by colour-blind readers too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

ThemeName = Literal["light", "dark"]
_STEPS = 64  # colours of a scale in a page


class Theme(NamedTuple):
    """Colours by their use; `series` are those of Okabe and Ito, lighter on dark paper."""

    paper: str
    ink: str
    muted: str
    line: str
    missing: str
    series: tuple[str, ...]
    signed: str | tuple[str, ...]  # a scale whose middle, zero, is nearest to the paper
    even: str | tuple[str, ...]  # a scale of even lightness, for numbers of one sign
    amount: tuple[str, ...]  # a scale that begins at the paper, for shares and probabilities


THEMES: dict[str, Theme] = {
    "light": Theme(
        paper="#ffffff",
        ink="#1b1f24",
        muted="#5c6670",
        line="#d8dde3",
        missing="#d9d9d9",
        series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#4d3a00", "#56b4e9", "#7b848e"),
        signed="PuOr_r",
        even="viridis",
        amount=("#f7fafd", "#cfe1f2", "#93c3df", "#4b97c9", "#1c6aae", "#0b3c74"),
    ),
    "dark": Theme(
        paper="#14171c",
        ink="#e8eaed",
        muted="#9aa4b0",
        line="#343b45",
        missing="#4a4f57",
        series=("#56b4e9", "#f0883e", "#2fc79a", "#e39cc4", "#f0e442", "#9ecbff", "#b8c0ca"),
        signed=("#7cc0ff", "#3f86d0", "#22507f", "#20242b", "#8a4f14", "#d6821f", "#ffc26b"),
        even="viridis",
        amount=("#1b2027", "#173a5a", "#1f608f", "#3c8dc4", "#7bbdea", "#d2ecff"),
    ),
}


class Scale(NamedTuple):
    """Which colours stand for the numbers from `low` to `high`."""

    kind: Literal["signed", "even", "amount"]
    low: float
    high: float

    def colours(self, theme: Theme) -> Colormap:
        """The scale as a colour map of matplotlib."""
        from matplotlib import colormaps
        from matplotlib.colors import LinearSegmentedColormap

        found = getattr(theme, self.kind)
        made = colormaps[found] if isinstance(found, str) else LinearSegmentedColormap.from_list(self.kind, found)
        return made.with_extremes(bad=theme.missing)

    def as_data(self) -> dict[str, Any]:
        """The scale for a page: its colours in each theme."""
        from matplotlib.colors import to_hex

        steps = [i / (_STEPS - 1) for i in range(_STEPS)]
        colours = {name: [to_hex(self.colours(theme)(step)) for step in steps] for name, theme in THEMES.items()}
        return {"low": self.low, "high": self.high, **colours}


def theme_of(name: str | None) -> Theme:
    """The theme of that name; light without one.

    Raises:
        ValueError: There is no such theme.
    """
    found = THEMES.get(name or "light")
    if found is None:
        raise ValueError(f"There is no theme {name!r}: choose one of {', '.join(THEMES)}.")
    return found


def scale_of(table: torch.Tensor) -> Scale:
    """The scale for a table of numbers: symmetric about zero where they have both signs."""
    known = table[table.isfinite()]
    low, high = (known.min().item(), known.max().item()) if known.numel() else (0.0, 1.0)
    if low < 0 < high:
        high = max(-low, high)
        return Scale("signed", -high, high)
    if low == high:
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    return Scale("even", low, high)


def ink_on(colour: Any) -> str:
    """Black or white, whichever is read better on a colour `(red, green, blue, …)`."""
    red, green, blue = (float(part) ** 2.2 for part in colour[:3])  # from sRGB to light
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.2 else "white"
