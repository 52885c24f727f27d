"""From values to the tree of nodes and the table of tensors that a message is made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import TravelError
from ..modeling import is_model_output, take_apart
from ._atoms import write_atom
from ._nodes import (
    AtomNode,
    BytesNode,
    Container,
    DictNode,
    FrozenSetNode,
    HeldNode,
    ListNode,
    LostNode,
    Node,
    PartsNode,
    SetNode,
    SliceNode,
    TensorNode,
    Tree,
    TupleNode,
)
from ._tensors import TensorWriter

_PLAIN = (type(None), bool, float, str)
_SHARED = (list, dict, set, OrderedDict)
_DEEPEST = 64
_UNWRITTEN = ListNode([])

Extend = Callable[["Encoder", Any], "Node | None"]


class Encoder:
    """Turns the values of one message into nodes.

    `extend` is asked first about values that are neither plain nor containers.  Containers are numbered, so that a
    list that two names stand for arrives as one list.
    """

    def __init__(self, extend: Extend | None = None, *, data_only: bool = False) -> None:
        self.tensors = TensorWriter()
        self.containers: list[Any] = []
        self.contents: list[Container] = []
        self._numbers: dict[int, int] = {}
        self._extend = extend
        self._data_only = data_only
        self._where: list[str] = []

    def encode(self, value: Any, where: str = "") -> Tree:
        """The node for a value.

        Args:
            value: Anything.
            where: What the value is called, for the error.

        Raises:
            TravelError: It, or a part of it, cannot travel; the message says which and why.
        """
        with self._inside(where):
            return self._encode(value)

    @contextmanager
    def _inside(self, part: str) -> Any:
        if len(self._where) > _DEEPEST:
            raise TravelError(f"{self.name()} cannot travel: it is nested more than {_DEEPEST} levels deep.")
        self._where.append(part)
        try:
            yield
        finally:
            self._where.pop()

    def name(self) -> str:
        """What the value that is being encoded is called."""
        return "`" + "".join(self._where[:8]) + ("…`" if len(self._where) > 8 else "`")

    def _encode(self, value: Any) -> Tree:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is int and -(2**63) <= value < 2**63:
            return value
        if self._extend is not None and kind is not tuple:
            found = self._extend(self, value)
            if found is not None:
                return found
        if kind in (torch.Tensor, torch.nn.Parameter) or (
            isinstance(value, torch.Tensor) and take_apart(value) is None
        ):
            return self._tensor(value)
        if kind in _SHARED:
            return self.hold(value, self._contents)
        if kind is tuple:
            return TupleNode(self.items(value))
        if kind is frozenset:
            return FrozenSetNode(self.items(value))
        return self._object(value)

    def _tensor(self, value: torch.Tensor) -> Tree:
        try:
            return TensorNode(self.tensors.add(value, data_only=self._data_only))
        except TravelError as error:
            raise TravelError(f"{self.name()} cannot travel: it is {error}.") from None

    def hold(self, value: Any, contents: Callable[[Any], Container]) -> HeldNode:
        """The node for a container, whose contents are encoded once."""
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.containers)
            self.containers.append(value)
            self.contents.append(_UNWRITTEN)
            self.contents[number] = contents(value)
        return HeldNode(number)

    def _contents(self, value: Any) -> Container:
        if isinstance(value, dict):
            return DictNode(self.pairs(value), isinstance(value, OrderedDict))
        return ListNode(self.items(value)) if type(value) is list else SetNode(self.items(value))

    def items(self, values: Any) -> list[Tree]:
        """The nodes of a sequence's items."""
        return [self.encode(item, f"[{number}]") for number, item in enumerate(values)]

    def pairs(self, values: dict[Any, Any]) -> list[tuple[Tree, Tree]]:
        """The nodes of a mapping's keys and values."""
        return [(self.encode(key, " (a key)"), self.encode(item, f"[{key!r}]")) for key, item in values.items()]

    def _object(self, value: Any) -> Tree:
        atom = write_atom(value)
        if atom is not None:
            return AtomNode(*atom)
        if type(value) is bytes:
            return BytesNode(value)
        if type(value) is slice:
            return SliceNode(*(self._encode(part) for part in (value.start, value.stop, value.step)))
        apart = take_apart(value)
        if apart is None:
            raise TravelError(f"{self.name()} cannot travel: {_describe(value)}.")
        if type(apart.parts) is not dict:
            return PartsNode(apart.kind, [], [self._part(part) for part in apart.parts])
        encode = self._field if is_model_output(apart.kind) else self._named
        return PartsNode(apart.kind, list(apart.parts), [encode(name, part) for name, part in apart.parts.items()])

    def _part(self, part: Any) -> Tree:
        """The lists that parts come in are new ones, which have no number."""
        return TupleNode([self._part(item) for item in part]) if type(part) is list else self._encode(part)

    def _named(self, name: str, value: Any) -> Tree:
        return self.encode(value, f".{name}")

    def _field(self, name: str, value: Any) -> Tree:
        try:
            return self._named(name, value)
        except TravelError as error:
            return LostNode(str(error))


def _describe(value: Any) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"it is a {name}, and only tensors, numbers, texts, plain containers of them, functions and classes do"
