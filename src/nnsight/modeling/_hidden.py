"""Block outputs: one tensor that also answers the tuple spelling, on every `transformers` release.

Older releases return `(hidden_states, ...)` from a decoder block, newer ones a bare tensor; code written for
either runs: `.output[0]` and `.output` are both the hidden states `[batch, seq, d_model]`.
"""

from __future__ import annotations

import ast
import functools
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module

from .._core import Alias, show_as
from ..errors import SourceError
from ..source import analyse

_tensor = torch.Tensor


class BlockOutput(Alias):
    """The hidden states a block returns, sharing storage with the model's own tensor.

    `[0]` is the hidden states and assigning `[0]` replaces them; another integer gives the item of the tuple
    that the block natively returns; any other index is the tensor's own.
    """

    _rest: tuple[Any, ...] | None
    _write: Callable[[Any], None]

    def __getitem__(self, index: Any) -> Any:
        if type(index) is not int:
            return _tensor.__getitem__(self._held, index)
        if index == 0:
            return self._held
        if self._rest is not None and -len(self._rest) <= index <= len(self._rest):
            return (self._held, *self._rest)[index]
        raise IndexError(_ROWS.format(index=index, batch=self.shape[0] if self.dim() else 0))

    def __setitem__(self, index: Any, value: Any) -> None:
        if type(index) is not int:
            self._held[index] = value
        elif index == 0:
            self._write(value)
            self._held = value
        elif self._rest is not None and 0 < index <= len(self._rest):
            items = [self._held, *self._rest]
            items[index] = value
            self._write(tuple(items))
            self._rest = tuple(items[1:])
        else:
            raise IndexError(_ROWS.format(index=index, batch=self.shape[0]))

    def __iter__(self) -> Iterator[Any]:
        return iter((self._held, *(self._rest or ())))


class FakeBlockOutput(BlockOutput, FakeTensor):  # type: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """The same in a scan."""


def show_block_output(value: Any, write: Callable[[Any], None]) -> Any:
    """What `.output` of a block gives for the `value` the block returned."""
    native = isinstance(value, tuple)
    held = value[0] if native and value else value
    if not isinstance(held, torch.Tensor) or isinstance(held, BlockOutput):
        return value
    shown = show_as(held, BlockOutput, FakeBlockOutput)
    shown._rest = tuple(value[1:]) if native else None
    shown._write = write
    return shown


def take_block_output(current: Any, assigned: Any) -> Any:
    """What the model gets when `assigned` is put in place of `current`, the block's native output.

    A tensor stands for the hidden states; a tuple for the whole, or, where the block returns a bare tensor,
    for a tuple whose first item is it.
    """
    if isinstance(assigned, BlockOutput):
        assigned = assigned._held
    if isinstance(current, tuple):
        return (assigned, *current[1:]) if isinstance(assigned, torch.Tensor) else assigned
    if isinstance(current, torch.Tensor) and isinstance(assigned, tuple) and assigned:
        first = assigned[0]
        return first._held if isinstance(first, BlockOutput) else first
    return assigned


@functools.cache
def returns_tuple(kind: type[Module]) -> bool | None:
    """Whether blocks of class `kind` return a tuple, as their source says; None where it does not."""
    tree = _forward_of(kind)
    if tree is None:
        return None
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            assigned.setdefault(node.targets[0].id, []).append(node.value)
    answers = {_is_tuple(value, assigned) for value in _returned(tree)}
    return answers.pop() if len(answers) == 1 else None


@functools.cache
def beside_hidden(kind: type[Module]) -> tuple[str, ...]:
    """What blocks of class `kind` always return behind the hidden states, in the words of their source."""
    tree = _forward_of(kind)
    tuples = [value for value in _returned(tree) if isinstance(value, ast.Tuple)] if tree is not None else []
    if not tuples or any(isinstance(item, ast.Starred) for value in tuples for item in value.elts):
        return ()
    shortest = min(tuples, key=lambda value: len(value.elts))
    return tuple(ast.unparse(item) for item in shortest.elts[1:])


def _forward_of(kind: type[Module]) -> ast.Module | None:
    try:
        return ast.parse(textwrap.dedent("\n".join(analyse(kind.forward).lines)))
    except SourceError:
        return None


def _returned(tree: ast.Module) -> list[ast.expr]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]


def _is_tuple(value: ast.expr, assigned: dict[str, list[ast.expr]]) -> bool | None:
    match value:
        case ast.Tuple():
            return True
        case ast.BinOp():
            return any(isinstance(side, ast.Tuple) for side in (value.left, value.right)) or None
        case ast.Name():
            return any(_is_tuple(v, {}) for v in assigned.get(value.id, ()) if not isinstance(v, ast.Name))
        case _:
            return None


_ROWS = """\
A block's output answers [0] with its hidden states [batch, seq, d_model], as older transformers releases do; there is \
no item {index}. For one row of the batch (there are {batch}) write [0][{index}] or [{index}:{index}+1]."""
