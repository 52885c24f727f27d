"""Colours, widths and tables in a terminal."""

import io
import re

import pytest

from nnsight.cli._terminal import VIRIDIS, Terminal, centre, display_width, fit, viridis


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "colours"),
    [
        (io.StringIO(), {}, 0),
        (Tty(), {}, 256),
        (Tty(), {"COLORTERM": "truecolor"}, 2**24),
        (Tty(), {"COLORTERM": "24bit"}, 2**24),
        (Tty(), {"TERM": "dumb"}, 0),
        (Tty(), {"NO_COLOR": "1"}, 0),
        (Tty(), {"NO_COLOR": ""}, 256),
        (io.StringIO(), {"FORCE_COLOR": "1"}, 256),
        (io.StringIO(), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, 0),
    ],
)
def test_colours(monkeypatch, stream, environment, colours):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Terminal(stream).colours == colours


def test_scale_runs_through_its_steps_and_is_clamped():
    steps = len(VIRIDIS) - 1
    assert tuple(viridis(i / steps) for i in range(steps + 1)) == VIRIDIS
    assert (viridis(-1), viridis(2)) == (VIRIDIS[0], VIRIDIS[-1])
    assert viridis(0.5 / steps) == (70, 20, 102)


@pytest.mark.parametrize("text", ["", "a", "city", "Colosseum", "東京都", "e\u0301te\u0301"])
@pytest.mark.parametrize("width", [2, 4, 7])
def test_text_takes_the_columns_it_is_given(text, width):
    assert display_width(fit(text, width)) == width
    assert display_width(centre(text, width)) == width
    if display_width(text) <= width:
        assert fit(text, width).rstrip() == text


def table(width, columns, monkeypatch, stream=None):
    monkeypatch.setenv("COLUMNS", str(width))
    labels = [f"w{i}" for i in range(columns)]
    values = [[i / columns for i in range(columns)]] * 2
    return list(Terminal(stream or io.StringIO()).grid(values, ["one", "two"], [labels], scale=1.0))


@pytest.mark.parametrize("columns", [1, 7, 40])
@pytest.mark.parametrize("width", [20, 80])
def test_table_fits_the_width_and_keeps_every_number(width, columns, monkeypatch):
    lines = table(width, columns, monkeypatch)
    assert max(map(len, lines)) <= width
    found = [int(cell) for line in lines if line.startswith("two") for cell in line.split()[1:]]
    assert found == [int(f"{100 * (i / columns):.0f}") for i in range(columns)]
    assert [label for line in lines if line.startswith(" ") for label in line.split()] == [
        f"w{i}" for i in range(columns)
    ]


def test_colours_change_nothing_but_the_colours(monkeypatch):
    plain = table(80, 7, monkeypatch)
    coloured = table(80, 7, monkeypatch, Tty())
    assert any("\x1b[" in line for line in coloured)
    bare = [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in coloured]
    assert bare[: len(plain)] == plain
