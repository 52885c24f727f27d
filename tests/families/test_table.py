"""The committed table: every family and every capability, and no cell without a mark or a reason."""

from __future__ import annotations

import re
from pathlib import Path

from zoo.capability import CAPABILITIES, ROWS

TEXT = (Path(__file__).parents[2] / "docs" / "families.md").read_text("utf-8")
TITLES = {"batched": "batched = single", "edit_model": "edit-model"}
NOTES = dict(re.findall(r"^<sup>(\d+)</sup> (.+?) *$", TEXT, re.MULTILINE))
HEAD, *LINES = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line[:1] == "|"]
TABLE = {row[0].strip("`"): dict(zip(HEAD[2:], row[2:], strict=True)) for row in LINES[1:]}


def note_of(cell: str) -> str:
    found = re.search(r"<sup>(\d+)</sup>", cell)
    return NOTES[found[1]] if found else ""


def test_every_family_and_capability() -> None:
    assert TABLE.keys() == ROWS.keys()
    assert HEAD[2:] == [TITLES.get(name, name) for name in CAPABILITIES]
    assert all(f"**{TITLES.get(name, name)}**" in TEXT for name in CAPABILITIES)


def test_no_cell_without_a_reason() -> None:
    for name, row in TABLE.items():
        for capability in CAPABILITIES:
            cell = row[TITLES.get(capability, capability)]
            reason = ROWS[name].reasons.get(capability)
            assert cell[:1] == ("✓" if reason is None else "—"), (name, capability, cell)
            assert reason is None or note_of(cell) == reason


def test_what_is_refused_is_said() -> None:
    for name, family in ROWS.items():
        assert bool(family.refuses) == ("refused" in note_of(TABLE[name][TITLES["batched"]])), name
