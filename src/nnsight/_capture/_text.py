"""Cutting a with-body out of source text, and placing what is parsed from it where the user wrote it."""

import ast
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any

from ..errors import CaptureError

STRINGS = (ast.Constant, ast.JoinedStr)


_parsing = Lock()
_ATTEMPTS = 5


def parse(source: str) -> ast.Module:
    """The syntax tree of a text; one at a time, because Python 3.11 confuses parsers in several threads.

    Others, as of an import in another thread, do not wait for a turn, so that it may take several attempts.
    """
    for _ in range(_ATTEMPTS):
        with _parsing, suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)


@dataclass(frozen=True)
class Text:
    """Consecutive source lines, each short of `margins[i]` bytes at its start.

    `first_line` is the line of the file that the first one comes from. A margin is negative where the text
    has more than the file.
    """

    source: str
    first_line: int = 1
    margins: tuple[int, ...] = ()

    @property
    def lines(self) -> list[str]:
        return split_lines(self.source)

    def parse(self) -> ast.Module:
        """The syntax tree, with positions in this text."""
        return parse(self.source)

    def parse_placed(self) -> ast.Module:
        """The syntax tree, with the positions in the user's file."""
        return self.place(self.parse())

    def place(self, tree: ast.Module) -> ast.Module:
        """Move a tree with positions in this text to the positions in the user's file."""
        if self.first_line == 1 and not any(self.margins):
            return tree
        for node in map(_located, ast.walk(tree)):
            if hasattr(node, "lineno"):
                node.lineno, node.col_offset = self._place(node.lineno, node.col_offset)
            if getattr(node, "end_lineno", None) is not None:
                node.end_lineno, node.end_col_offset = self._place(node.end_lineno, node.end_col_offset)
        return tree

    def _place(self, line: int, column: int) -> tuple[int, int]:
        margin = self.margins[line - 1] if line <= len(self.margins) else 0
        return line + self.first_line - 1, max(column + margin, 0)


def _located(node: ast.AST) -> Any:
    """The node, of which many kinds have a position, but not as a common type."""
    return node


def split_lines(source: str) -> list[str]:
    """Lines as the parser counts them; `str.splitlines` also splits at form feeds and the like."""
    return [line + "\n" for line in source.split("\n")]


def cut(text: Text, with_: ast.With | ast.AsyncWith, item: int) -> Text:
    """What runs inside item number `item` of a with-statement of `text`: the other items and the body."""
    lines = text.lines
    part = _body(lines, with_) if item == len(with_.items) - 1 else _rest(lines, with_, item)
    margins = tuple(
        margin + (text.margins[part.first_line - 1 + i] if text.margins else 0) for i, margin in enumerate(part.margins)
    )
    part = Text(part.source, part.first_line + text.first_line - 1, margins)
    _check(part, with_, item)
    return part


def _body(lines: list[str], with_: ast.With | ast.AsyncWith) -> Text:
    first = with_.body[0]
    start = min([first.lineno, *(node.lineno for node in getattr(first, "decorator_list", ()))])
    line = lines[start - 1].encode()
    before = line[: first.col_offset] if start == first.lineno else b""
    if before.strip():  # on the line of the `with`
        return _joined(line[first.col_offset :].decode(), first.col_offset, lines, with_, start, "")
    indent = line[: len(line) - len(line.lstrip())].decode()
    return _joined(line[len(indent) :].decode(), len(indent), lines, with_, start, indent)


def _rest(lines: list[str], with_: ast.With | ast.AsyncWith, item: int) -> Text:
    """`with a, b: …` less the items up to `item`, by the comma that follows that one."""
    row, column, depth = _comma(lines, with_, item)
    line = lines[row - 1].encode()[column:].decode()
    prefix = "with (" if depth else "with "
    shown = line.lstrip(" \t")
    indent = lines[with_.lineno - 1].encode()[: with_.col_offset].decode()
    margin = column + len(line) - len(shown) - len(prefix)
    return _joined(prefix + shown, margin, lines, with_, row, indent)


def _joined(first: str, margin: int, lines: list[str], with_: ast.With | ast.AsyncWith, row: int, indent: str) -> Text:
    """The line given and those that follow it in the statement, dedented but for the insides of strings."""
    followers = range(row + 1, (with_.end_lineno or row) + 1)
    margins = list(_margins(lines, followers, with_, indent))
    rest = [lines[number - 1][width:] for number, width in zip(followers, margins, strict=True)]
    return Text("".join([first, *rest]), row, (margin, *margins))


def dedent(text: str) -> str:
    """The text of a statement without the indentation of its first line, but for the insides of strings.

    Raises:
        SyntaxError: It is not a statement.
    """
    indent = text[: len(text) - len(text.lstrip(" \t"))]
    if not indent:
        return text
    lines = split_lines(f"if True:\n{text}")
    numbers = range(2, len(lines) + 1)
    margins = _margins(lines, numbers, parse("".join(lines)), indent)
    return "".join(lines[number - 1][width:] for number, width in zip(numbers, margins, strict=True))


def _margins(lines: list[str], numbers: Iterable[int], tree: ast.AST, indent: str) -> Iterator[int]:
    """How much of each line is indentation that goes: none inside of a string."""
    kept = set(_string_lines(tree))
    for number in numbers:
        yield len(indent) if number not in kept and lines[number - 1].startswith(indent) else 0


def _string_lines(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, STRINGS) and node.end_lineno is not None:
            yield from range(node.lineno + 1, node.end_lineno + 1)


def _comma(lines: list[str], with_: ast.With | ast.AsyncWith, item: int) -> tuple[int, int, int]:
    """Line and column behind the comma after an item, and how many parentheses are open there."""
    start, depth = (with_.lineno, with_.col_offset + len("with")), 0
    for index in range(item + 2):
        node = with_.items[index].context_expr
        for row, column, char in _between(lines, start, (node.lineno, node.col_offset)):
            depth += {"(": 1, ")": -1}.get(char, 0)
            if char == "," and index == item + 1:
                return row, column + 1, depth
        last = with_.items[index].optional_vars or node
        start = (last.end_lineno or 0, last.end_col_offset or 0)
    raise AssertionError("two items of a with-statement have a comma between them")


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int, str]]:
    """The characters between two places with no strings in between, without comments."""
    row, column = start
    while row <= end[0]:
        line = lines[row - 1].encode()
        stop = end[1] if row == end[0] else len(line)
        code = line[column:stop].split(b"#")[0]
        yield from ((row, column + i, chr(byte)) for i, byte in enumerate(code))
        row, column = row + 1, 0


def _check(part: Text, with_: ast.With | ast.AsyncWith, item: int) -> None:
    """Refuse a text that does not mean what the statement meant."""
    rest = with_.items[item + 1 :]
    meant = [ast.With(items=rest, body=with_.body)] if rest else with_.body
    try:
        found = part.parse().body
    except SyntaxError:
        found = []
    if [ast.dump(node) for node in found] != [ast.dump(node) for node in meant]:
        raise CaptureError(
            f"line {part.first_line}: the text of this with-block cannot be taken out of its file, because "
            "of how it is laid out. Put the body on lines of its own, indented with spaces or tabs alone."
        )
