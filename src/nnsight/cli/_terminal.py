"""Terminal: text with colours where the stream shows them, and as plain text everywhere else."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TextIO

RGB = tuple[int, int, int]

# Viridis at ten even steps: even in lightness, and readable without telling red from green.
VIRIDIS: tuple[RGB, ...] = (
    *((68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142)),
    *((31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37)),
)
_CUBE = (0, 95, 135, 175, 215, 255)  # the levels of each channel among the 256 colours


class Terminal:
    """Writes to one stream.

    Args:
        stream: Where to write.

    Attributes:
        colours: 0 (plain text), 256, or 2**24.
        width: Columns in a line.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.colours = colours_of(stream)
        self.width = shutil.get_terminal_size((100, 24)).columns

    def print(self, text: str = "") -> None:
        print(text, file=self._stream, flush=True)

    def heading(self, text: str) -> None:
        """Start a section."""
        self.print("\n" + self._style(text, "1"))

    def paint(self, text: str, fraction: float) -> str:
        """`text` on the colour that stands for `fraction` of the scale."""
        if not self.colours:
            return text
        back = viridis(fraction)
        front = (255, 255, 255) if _lightness(back) < 0.5 else (0, 0, 0)
        return self._style(text, f"{self._colour(48, back)};{self._colour(38, front)}")

    def grid(
        self,
        rows: Sequence[Sequence[float]],
        row_labels: Sequence[str],
        column_labels: Sequence[Sequence[str]],
        scale: float,
    ) -> Iterator[str]:
        """The lines of a table of probabilities, in per cent on their colours.

        Args:
            rows: The probabilities `[row][column]`.
            row_labels: One label a row.
            column_labels: One or more lines of labels above the columns; what is too wide goes below.
            scale: The probability at the upper end of the colours.
        """
        margin = max(map(len, row_labels)) + 2
        columns = len(column_labels[0])
        longest = max(display_width(label) for line in column_labels for label in line)
        size = max(min((self.width - margin) // columns, longest + 1), 6)
        step = max((self.width - margin) // size, 1)
        digits = 0 if scale >= 0.1 else 1
        for start in range(0, columns, step):
            part = slice(start, start + step)
            if start:
                yield ""
            for line in column_labels:
                if any(line[part]):
                    yield (" " * margin + "".join(centre(label, size) for label in line[part])).rstrip()
            for name, values in zip(row_labels, rows, strict=True):
                cells = (self.paint(centre(f"{100 * value:.{digits}f}", size), value / scale) for value in values[part])
                yield (f"{name:<{margin}}" + "".join(cells)).rstrip()
        if self.colours:
            steps = 24
            bar = "".join(self.paint(" ", i / (steps - 1)) for i in range(steps))
            yield f"\n{'':<{margin}}0 {bar} {100 * scale:.{digits}f} %"

    def _style(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours else text

    def _colour(self, ground: int, colour: RGB) -> str:
        if self.colours > 256:
            return f"{ground};2;{';'.join(map(str, colour))}"
        red, green, blue = (min(range(6), key=lambda i: abs(_CUBE[i] - channel)) for channel in colour)
        return f"{ground};5;{16 + 36 * red + 6 * green + blue}"


def colours_of(stream: TextIO) -> int:
    """How many colours to use: none under `NO_COLOR`; else some on a terminal, or under `FORCE_COLOR`."""
    if os.environ.get("NO_COLOR"):
        return 0
    if not os.environ.get("FORCE_COLOR") and (not stream.isatty() or os.environ.get("TERM") == "dumb"):
        return 0
    return 2**24 if os.environ.get("COLORTERM") in ("truecolor", "24bit") else 256


def viridis(fraction: float) -> RGB:
    """The colour at a fraction of the scale, which is clamped to 0..1."""
    place = min(max(fraction, 0.0), 1.0) * (len(VIRIDIS) - 1)
    below = min(int(place), len(VIRIDIS) - 2)
    low, high = VIRIDIS[below], VIRIDIS[below + 1]
    red, green, blue = (round(a + (b - a) * (place - below)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def display_width(text: str) -> int:
    """How many columns of a terminal `text` takes."""
    return sum(_columns(character) for character in text)


def fit(text: str, width: int) -> str:
    """`text` cut or padded to `width` columns."""
    if display_width(text) > width:
        while display_width(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - display_width(text))


def centre(text: str, width: int) -> str:
    """`text` in the middle of `width` columns, cut to leave one free."""
    text = fit(text, min(display_width(text), width - 1))
    room = width - display_width(text)
    return " " * ((room + 1) // 2) + text + " " * (room // 2)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _lightness(colour: RGB) -> float:
    red, green, blue = colour
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255
