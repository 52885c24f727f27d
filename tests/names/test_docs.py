"""The page on names has every name and every family."""

import re
from pathlib import Path

from nnsight.names import _families, _hooks, _terms

PAGE = (Path(__file__).parents[2] / "docs" / "names.md").read_text("utf-8")


def test_families() -> None:
    table = PAGE[PAGE.index("## Families") : PAGE.index("## Checked")]
    listed = {
        name for row in table.splitlines() if row.count("|") == 4 for name in re.findall(r"`(\w+)`", row.split("|")[2])
    }
    assert listed - {"model_type"} == _families.TABLE.keys()


def test_names_and_shapes() -> None:
    table = PAGE[PAGE.index("## Names and shapes") : PAGE.index("This is also the order")]
    rows = [row.split("|")[1:3] for row in table.splitlines() if row.startswith("| `")]
    shapes = {name: shape for names, shape in rows for name in re.findall(r"[\w.\[\]]+", names.replace("`", ""))}
    for name, axes in _terms.LAYER.items():
        if name.startswith("cross_"):
            continue
        head = name.startswith("head_")
        what = name.removeprefix("head_")
        spelled = next(n for n in ((f"heads[i].{what}", f".{what}") if head else (f"{name}[i]",)) if n in shapes)
        assert f"[{', '.join(axes)}]" in shapes[spelled], name
    assert "[batch, pos, vocab]" in shapes["logits"]


def test_hooks() -> None:
    table = PAGE[PAGE.index("| hook | value |") : PAGE.index("Weights are the model's own")]
    listed = set(re.findall(r"[\w.]*hook_\w+", table))
    known = {*_hooks._WHOLE, *_hooks._BLOCK}
    assert {name.rpartition(".")[2] for name in listed} == {name.rpartition(".")[2] for name in known}
