"""Runs the tests of every family of models, and writes what they showed to docs/families.md: `make families`.

A cell is empty nowhere: either tests ran for it, and all of them passed or one did not, or the family's data in
tests/families/zoo give the reason why there is nothing to run.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "families.md"
VOCABULARY = ROOT / "tests" / "names"
sys.path.insert(0, str(ROOT / "tests" / "families"))

from zoo.capability import CAPABILITIES, ROWS  # noqa: E402

PASSED, FAILED, NOTHING = "✓", "✗", "—"


class Cell(NamedTuple):
    mark: str
    note: str = ""


class Recorder:
    """A pytest plugin: which tests there were for a family and a capability, and how they ended."""

    def __init__(self) -> None:
        self._cells: dict[str, tuple[str, str]] = {}
        self.outcomes: dict[tuple[str, str], list[bool]] = {}
        self.refused: dict[str, set[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marker = item.get_closest_marker("capability")
            name = getattr(item, "callspec", None) and item.callspec.id.split("-")[0]  # pyright: ignore[reportAttributeAccessIssue]
            if marker is not None:
                self._cells[item.nodeid] = (self._family_of(item), marker.args[0])
            elif VOCABULARY in item.path.parents and name in ROWS:
                self._cells[item.nodeid] = (name, "vocabulary")

    def _family_of(self, item: Any) -> str:
        return item.callspec.params["family"].name

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell = self._cells.get(report.nodeid)
        if cell is None or report.skipped or (report.passed and report.when != "call"):
            return
        self.outcomes.setdefault(cell, []).append(report.passed)
        for name, value in report.user_properties:
            if name == "refused":
                self.refused.setdefault(cell[0], set()).update(_without_numbers(place) for place in value)  # type: ignore[arg-type]


def _without_numbers(place: str) -> str:
    return re.sub(r"\b\d+\b", "*", place) if place != ".output" else "the model's own output"


def _describe(refused: Iterable[str]) -> str:
    """Places with both their input and their output without the difference."""
    places = set(refused)
    both = {place.removesuffix(".input") for place in places if f"{place.removesuffix('.input')}.output" in places}
    rest = {place for place in places if place.rpartition(".")[0] not in both}
    names = sorted(both | rest)
    return ", ".join(name if " " in name else f"`{name}`" for name in names)


def cells(recorder: Recorder) -> dict[str, dict[str, Cell]]:
    """By family and capability."""
    return {name: {capability: _cell(recorder, name, capability) for capability in CAPABILITIES} for name in ROWS}


def _cell(recorder: Recorder, family: str, capability: str) -> Cell:
    outcomes = recorder.outcomes.get((family, capability))
    if outcomes is None:
        reason = ROWS[family].reasons.get(capability)
        return Cell(FAILED, "no test ran") if reason is None else Cell(NOTHING, reason)
    if not all(outcomes):
        return Cell(FAILED, f"{outcomes.count(False)} of {len(outcomes)} tests failed")
    refused = recorder.refused.get(family) if capability == "batched" else None
    return Cell(PASSED, f"refused by name in an invoke: {_describe(refused)}" if refused else "")


def render(table: dict[str, dict[str, Cell]]) -> str:
    """The document."""
    notes: dict[str, int] = {}
    lines = [_HEAD.format(transformers=transformers.__version__, torch=torch.__version__.split("+")[0])]
    lines += [f"- **{_title(name)}**: {meaning}." for name, meaning in CAPABILITIES.items()]
    lines += ["", _row(["family", "model", *map(_title, CAPABILITIES)]), _row(["---"] * (2 + len(CAPABILITIES)))]
    for family, row in table.items():
        kind = type(ROWS[family].make()).__name__
        lines.append(_row([f"`{family}`", f"`{kind}`", *(_show(cell, notes) for cell in row.values())]))
    lines += ["", *(f"<sup>{number}</sup> {note}" + "  " for note, number in notes.items())]
    return "\n".join(lines).rstrip() + "\n"


def _title(capability: str) -> str:
    return {"batched": "batched = single", "edit_model": "edit-model"}.get(capability, capability)


def _row(items: Iterable[str]) -> str:
    return "| " + " | ".join(items) + " |"


def _show(cell: Cell, notes: dict[str, int]) -> str:
    if not cell.note:
        return cell.mark
    return f"{cell.mark}<sup>{notes.setdefault(cell.note, len(notes) + 1)}</sup>"


_HEAD = """\
# Families

What the tests show of every family of models, written by `make families` from what ran (transformers {transformers}, \
torch {torch}, CPU). Every model is small and random, built from its config, with the options that set its family apart: \
sliding windows, soft caps, parallel blocks, partial rotary positions, multi-query attention, sinks, experts. All \
numbers are compared with the plain model's, hooked by hand.
"""


def main() -> int:
    recorder = Recorder()
    folders = [str(ROOT / "tests" / "families"), *([str(VOCABULARY)] if VOCABULARY.exists() else [])]
    quiet = ("-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
    arguments = [*quiet, *folders, *sys.argv[1:]]
    code = pytest.main(arguments, plugins=[recorder])
    TABLE.write_text(render(cells(recorder)), "utf-8")
    print(f"wrote {TABLE.relative_to(ROOT)}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
