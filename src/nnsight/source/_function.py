"""What is known of one function: its text, its operations, and its code that routes them to a dispatch."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MappingProxyType

from nnsight.errors import SourceError

from ._compile import compile_in_place, qualified_name
from ._operations import Operation, describe, named_calls
from ._render import render, render_around
from ._rewrite import rewrite
from ._text import read

LIMIT = 512  # functions remembered


@dataclass(frozen=True, eq=False)
class FunctionSource:
    """A function's source and the operations in it, in the order of evaluation."""

    name: str
    file: str
    first_line: int
    lines: tuple[str, ...] = field(repr=False)
    operations: Mapping[str, Operation] = field(repr=False)
    code: CodeType = field(repr=False)
    instrumented: CodeType = field(repr=False)
    partly: dict[frozenset[str], CodeType] = field(repr=False, default_factory=dict)

    def find(self, name: str) -> Operation:
        """The operation of that name; `SourceError` says which ones there are."""
        if name in self.operations:
            return self.operations[name]
        close = difflib.get_close_matches(name, self.operations, n=3) or list(self.operations)
        there = f"it has {', '.join(close)}" if close else "it makes no calls"
        raise SourceError(f"{self.name} has no operation {name}; {there}")

    def render(self, highlight: str | None = None) -> str:
        """The source with its operations in a gutter, or the lines around the operation to highlight."""
        title = f"{self.name} ({self.file}:{self.first_line})"
        operations = self.operations.values()
        if highlight is None:
            return render(title, self.lines, operations)
        return render_around(title, self.lines, operations, self.find(highlight))

    def __str__(self) -> str:
        return self.render()


def instrumented_code(function: FunctionType, only: frozenset[str] | None) -> CodeType:
    """The code of a function that routes its operations, or `only` some, to a dispatch."""
    source = source_of(function)
    if only is None:
        return source.instrumented
    found = source.partly.get(only)
    if found is None:
        text = read(function)
        rewrite(text.definition, only)
        found = source.partly[only] = compile_in_place(text.definition, function, text.imported)
    return found


_known: dict[int, FunctionSource] = {}  # by the code's identity: equal code may come from different files
_lock = threading.Lock()


def source_of(function: FunctionType) -> FunctionSource:
    """The source of a Python function as it stands, whatever it wraps."""
    code = function.__code__
    known = _known.get(id(code))
    return _remember(_examine(function)) if known is None else known


def _remember(source: FunctionSource) -> FunctionSource:
    with _lock:
        if len(_known) >= LIMIT:
            del _known[next(iter(_known))]
        return _known.setdefault(id(source.code), source)


def _examine(function: FunctionType) -> FunctionSource:
    code = function.__code__
    text = read(function)
    calls = named_calls(text.definition)
    operations = {name: describe(name, call, code.co_firstlineno) for name, call in calls.items()}
    rewrite(text.definition)
    return FunctionSource(
        name=qualified_name(function),
        file=code.co_filename,
        first_line=code.co_firstlineno,
        lines=text.lines,
        operations=MappingProxyType(operations),
        code=code,
        instrumented=compile_in_place(text.definition, function, text.imported),
    )
