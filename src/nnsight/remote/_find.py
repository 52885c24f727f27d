"""Where a lambda or a class stands in its file: its text, found by the lines and columns that its code remembers."""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
from collections.abc import Iterable
from functools import lru_cache
from types import CodeType, FunctionType
from typing import NamedTuple

from .._capture import dedent, parse
from ..errors import TravelError
from ._current import is_compiled_from


class Found(NamedTuple):
    """A dedented text, and the file and line that it comes from."""

    text: str
    filename: str
    first_line: int


@lru_cache(maxsize=16)
def _tree(text: str) -> ast.Module:
    return parse(text)


def _file(code: CodeType) -> tuple[list[str], ast.Module | None]:
    """The lines of the file of a code, and its tree where it can be read."""
    lines = linecache.getlines(code.co_filename)
    try:
        return lines, _tree("".join(lines))
    except SyntaxError:
        return lines, None


def find_lambda(function: FunctionType) -> Found:
    """`_ = lambda …` for a lambda, wherever in a statement it stands.

    Raises:
        TravelError: It is not there, or cannot be told from another one.
    """
    code = function.__code__
    _, tree = _file(code)
    nodes = ast.walk(tree) if tree is not None else ()
    found = [node for node in nodes if isinstance(node, ast.Lambda) and _may_be(node, code)]
    smallest = min((_size(node) for node in found), default=0)
    found = [node for node in found if _size(node) == smallest]
    if not found:
        raise TravelError(
            "A lambda cannot travel: it is not found in its file, or this has changed since it was loaded. Define it with "
            "`def`."
        )
    if len({ast.unparse(node) for node in found}) != 1:
        raise TravelError("A lambda cannot travel where several stand on its line: define it with `def`.")
    return Found(f"_ = {ast.unparse(found[0])}\n", code.co_filename, found[0].lineno)


def _may_be(node: ast.Lambda, code: CodeType) -> bool:
    if node.lineno != code.co_firstlineno or not is_compiled_from(code, [ast.copy_location(ast.Expr(node), node)]):
        return False
    return all(_span(node)[0] <= begin and end <= _span(node)[1] for begin, end in _spots(code))


Spot = tuple[int, int]


def _span(node: ast.expr) -> tuple[Spot, Spot]:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _size(node: ast.expr) -> int:
    """How much a node covers, to tell the inner of two, each of which could be meant."""
    return len(ast.dump(node))


def _spots(code: CodeType) -> Iterable[tuple[Spot, Spot]]:
    """Where in the file the instructions of a code come from; Python 3.10 knows no columns."""
    if sys.version_info < (3, 11):
        return
    for line, last_line, column, last_column in code.co_positions():
        if line is None or last_line is None or column is None or last_column is None or not last_column:
            continue
        yield (line, column), (last_line, last_column)


# --- classes ------------------------------------------------------------------------------------------------------


def find_class(cls: type) -> Found:
    """The definition of a class; its methods know the file where the class itself does not, as in a notebook.

    Raises:
        OSError: There is no source.
    """
    for method in vars(cls).values():
        function = getattr(method, "__func__", getattr(method, "fget", method))
        if isinstance(function, FunctionType) and function.__qualname__ == f"{cls.__qualname__}.{function.__name__}":
            lines, tree = _file(function.__code__)
            nodes = ast.walk(tree) if tree is not None else ()
            for node in nodes:
                if isinstance(node, ast.ClassDef) and node.name == cls.__name__ and _has(node, function):
                    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                    text = dedent("".join(lines[first - 1 : node.end_lineno]))
                    return Found(text, function.__code__.co_filename, first)
    lines, first = inspect.getsourcelines(cls)
    return Found(dedent("".join(lines)), inspect.getsourcefile(cls) or "<unknown>", first)


def _has(node: ast.ClassDef, function: FunctionType) -> bool:
    return any(
        isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))
        and part.name == function.__name__
        and min([part.lineno, *(decorator.lineno for decorator in part.decorator_list)])
        == function.__code__.co_firstlineno
        for part in node.body
    )
