"""A function's source with its operations named beside it."""

import re

import pytest

from nnsight.errors import SourceError
from nnsight.source import analyse

ROW = re.compile(r"(?P<name>\w*) +(?P<mark>->|=>|\||\+)? *(?P<number>\d+)?(?:  (?P<code>.*))?")


def double(x, scale):
    # The comment stays.
    halved = x.div(2).abs()

    return scale(
        halved,
        4,
    )


def test_the_gutter_names_the_operations_of_each_line():
    title, blank, *rows = str(analyse(double)).split("\n")
    assert title == f"double ({__file__}:{double.__code__.co_firstlineno})"
    assert blank == ""
    assert rows == [
        "               1  def double(x, scale):",
        "               2      # The comment stays.",
        "x_div_0     -> 3      halved = x.div(2).abs()",
        "x_div_abs_0  +",
        "               4",
        "scale_0     -> 5      return scale(",
        "               6          halved,",
        "               7          4,",
        "               8      )",
    ]


def test_every_line_and_operation_of_a_real_forward_is_there(gpt2_small):
    source = analyse(gpt2_small.transformer.h[0].attn)
    rows = [ROW.fullmatch(row) for row in source.render().split("\n")[2:]]
    assert [row["name"] for row in rows if row["name"]] == [
        op.name for op in sorted(source.operations.values(), key=lambda op: op.line)
    ]
    numbered = [row for row in rows if row["number"]]
    assert [int(row["number"]) for row in numbered] == list(range(1, len(source.lines) + 1))
    for row in numbered:
        line = source.lines[int(row["number"]) - 1]
        assert (row["code"] or "").strip() == line.strip()
    (proj,) = [row for row in rows if row["name"] == "self_c_proj_0"]
    assert proj["code"].strip() == "attn_output = self.c_proj(attn_output)"
    assert proj["mark"] == "->"


def test_a_highlight_shows_the_lines_around_one_operation(gpt2_small):
    source = analyse(gpt2_small.transformer.h[0].attn)
    operation = source.operations["attention_interface_0"]
    _, _, *rows = source.render("attention_interface_0").split("\n")
    assert rows[0] == rows[-1] == "..."
    marked = [row for row in map(ROW.fullmatch, rows[1:-1]) if row["mark"] in ("=>", "|")]
    assert marked[0]["name"] == "attention_interface_0"
    assert [int(row["number"]) for row in marked] == list(range(operation.line, operation.end + 1))
    assert len(rows) < len(source.lines) // 2


def test_a_highlight_of_a_second_operation_on_a_line():
    rows = analyse(double).render("x_div_abs_0").split("\n")
    assert "x_div_abs_0 =>" in rows
    assert "x_div_0     -> 3      halved = x.div(2).abs()" in rows


def test_a_function_without_calls():
    def plain(x):
        return x

    assert str(analyse(plain)).split("\n")[2:] == ["    1  def plain(x):", "    2      return x"]


def test_a_highlight_that_is_not_there():
    with pytest.raises(SourceError, match="it has x_div_0, x_div_abs_0, scale_0"):
        analyse(double).render("nothing")
