"""How a result reads: as a table in a terminal, and with colours in a notebook."""

from __future__ import annotations

import html
import math
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from ._result import Result

_ROWS = 24
_CELL = 10  # characters of a label over a column
_BLUE, _ORANGE = (33, 102, 172), (230, 97, 1)  # told apart by people who are colour-blind


class _Table(NamedTuple):
    """A table of at most two axes: labels, numbers `[row, column]`, and what is written in each cell."""

    rows: list[str]
    columns: list[str]
    values: torch.Tensor
    cells: list[list[str]]
    corner: str


def as_text(result: Result) -> str:
    """The result's facts, and its numbers as far as they fit the terminal."""
    lines = list(_facts(result))
    if result.values.numel() == 0:
        return "\n".join(lines)
    table = _make_table(result)
    width = max([len(cell) for row in table.cells for cell in row] + [min(len(c), _CELL) for c in table.columns])
    side = max(len(name) for name in (*table.rows, table.corner))
    room = max((shutil.get_terminal_size((100, 24)).columns - side) // (width + 1), 1)
    lines.append("")
    lines.append(_line(table.corner, table.columns, side, width, room))
    lines += [_line(*pair, side, width, room) for pair in zip(table.rows[:_ROWS], table.cells, strict=False)]
    if len(table.rows) > _ROWS:
        lines.append(f"… {len(table.rows) - _ROWS} more rows")
    return "\n".join(lines)


def as_html(result: Result) -> str:
    """The result's facts, and its numbers as a coloured table."""
    facts = "".join(f"<div>{html.escape(line)}</div>" for line in _facts(result))
    if result.values.numel() == 0:
        return f"<div>{facts}</div>"
    table = _make_table(result)
    finite = table.values[table.values.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 1.0
    head = "".join(f"<th>{html.escape(label)}</th>" for label in (table.corner, *table.columns))
    body = "".join(
        f"<tr><th>{html.escape(label)}</th>{''.join(map(_cell, cells, values, [largest] * len(cells)))}</tr>"
        for label, cells, values in zip(table.rows, table.cells, table.values.tolist(), strict=True)
    )
    return f"<div>{facts}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _facts(result: Result) -> list[str]:
    shape = " × ".join(f"{name} {len(labels)}" for name, labels in result.axes.items()) or "one number"
    first = f"{result.name}: {shape}"
    lines = [result.title, first] if result.title else [first]
    known = result.values[result.values.isfinite()]
    if known.numel():
        lines.append(f"from {float(known.min()):.4g} to {float(known.max()):.4g}")
    if result.baseline:
        means = (f"{name} {float(value.float().nanmean()):.4g}" for name, value in result.baseline.items())
        lines.append(f"baseline: {', '.join(means)}")
    return lines


def _make_table(result: Result) -> _Table:
    """The last two axes as rows and columns, the prompts averaged, further axes one below the other."""
    while "pair" in result.axes and len(result.axes) > 1:
        result = result.mean("pair")
    names, labels = list(result.axes), list(result.axes.values())
    columns = list(map(label_of, labels[-1])) if labels else [result.name]
    rows = [""]
    for axis in labels[:-1]:
        rows = [f"{row} {label_of(label)}".strip() for row in rows for label in axis]
    if len(names) == 1:
        rows = [result.name]
    values = result.values.float().reshape(len(rows), len(columns))
    texts = result.texts or _numbers(values)
    cells = [list(texts[i * len(columns) : (i + 1) * len(columns)]) for i in range(len(rows))]
    corner = " ".join(names[:-1]) + (f" \\ {names[-1]}" if len(names) > 1 else "")
    return _Table(rows, columns, values, cells, corner)


def label_of(label: Any) -> str:
    """A label on one line, with its spaces and line ends in sight where they would be lost."""
    return str(label).replace("\n", "\\n").replace("\t", "\\t") if str(label).strip() else repr(str(label))


def _numbers(values: torch.Tensor) -> list[str]:
    known = values[values.isfinite()].abs()
    largest = float(known.max()) if known.numel() else 0.0
    digits = 2 if largest == 0 else min(max(2 - math.floor(math.log10(largest)), 0), 6)
    return [f"{value:.{digits}f}" for value in values.flatten().tolist()]


def _line(label: str, cells: list[str], side: int, width: int, room: int) -> str:
    shown = cells if len(cells) <= room else cells[: max(room - 1, 1)]
    text = " ".join(_short(cell, width).rjust(width) for cell in shown)
    return f"{label:<{side}} {text}{' …' if len(shown) < len(cells) else ''}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _cell(text: str, value: float, largest: float) -> str:
    share = min(abs(value) / largest, 1.0) if largest and math.isfinite(value) else 0.0
    red, green, blue = _ORANGE if value > 0 else _BLUE
    style = f"background: rgba({red}, {green}, {blue}, {share * 0.6:.2f}); text-align: right"
    return f'<td style="{style}" title="{value:.6g}">{html.escape(text)}</td>'
