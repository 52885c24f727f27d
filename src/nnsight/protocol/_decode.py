"""From the tree of nodes back to values; whatever a message says, nothing is run to make one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ProtocolError
from ..modeling import put_together
from ._atoms import read_atom
from ._nodes import (
    AtomNode,
    BytesNode,
    Container,
    FrozenSetNode,
    GivenNode,
    HeldNode,
    InstanceNode,
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

_PLAIN = (type(None), bool, int, float, str)
_DEEPEST = 100


class Lost:
    """Stands for a part of a value that could not travel; any use of it says why."""

    __slots__ = ("_reason",)

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __repr__(self) -> str:
        return f"<not sent: {self._reason}>"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"This part of the result was not sent. {self._reason}")


class Decoder:
    """Turns the nodes of one message into values; `given` are the containers and tensors that the other side had."""

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        contents: Sequence[Container],
        given: tuple[Sequence[Any], Sequence[torch.Tensor]] = ((), ()),
    ) -> None:
        self.tensors = tensors
        self.containers: dict[int, Any] = {}
        self._contents = contents
        self._given = given
        self._depth = 0

    def decode(self, node: Tree) -> Any:
        """The value of a node.

        Raises:
            ProtocolError: The node refers to nothing, or makes no value.
        """
        if type(node) in _PLAIN:
            return node
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ProtocolError("a value is nested too deep")
        try:
            return self._decode(node)
        finally:
            self._depth -= 1

    def _decode(self, node: Node) -> Any:
        match node:
            case TensorNode():
                return _at(self.tensors, node.index, "tensor")
            case HeldNode():
                return self._container(node.index)
            case TupleNode():
                return tuple(self.decode(item) for item in node.items)
            case FrozenSetNode():
                return frozenset(self._hashable(item) for item in node.items)
            case AtomNode():
                return read_atom(node.kind, node.text)
            case BytesNode():
                return node.data
            case SliceNode():
                return slice(self.decode(node.start), self.decode(node.stop), self.decode(node.step))
            case PartsNode():
                return self._together(node)
            case LostNode():
                return Lost(node.reason)
            case GivenNode():
                return _at(self._given[node.tensor], node.index, "given value")
            case _:
                return self.other(node)

    def other(self, node: Node) -> Any:
        """A node that only a job may have."""
        raise ProtocolError(f"a {type(node).__name__} has no place in this message")

    def _container(self, index: int) -> Any:
        if index in self.containers:
            return self.containers[index]
        node = _at(self._contents, index, "container")
        if isinstance(node, InstanceNode):
            return self.instance(index, node)
        made: Any
        if isinstance(node, ListNode):
            made = self.containers[index] = []
            made.extend(self.decode(item) for item in node.items)
        elif isinstance(node, SetNode):
            made = self.containers[index] = set()
            made.update([self._hashable(item) for item in node.items])
        else:
            made = self.containers[index] = OrderedDict() if node.ordered else {}
            for key, item in node.items:
                made[self._hashable(key)] = self.decode(item)
        return made

    def instance(self, index: int, node: InstanceNode) -> Any:
        """An object with attributes, which only a job may have."""
        raise ProtocolError("an instance has no place in this message")

    def _hashable(self, node: Tree) -> Any:
        value = self.decode(node)
        try:
            hash(value)
        except TypeError as error:
            raise ProtocolError(f"a {type(value).__name__} cannot be a key") from error
        return value

    def _together(self, node: PartsNode) -> Any:
        parts: Any = [self.decode(item) for item in node.items]
        if node.names:
            if len(node.names) != len(parts):
                raise ProtocolError("as many names as parts belong to an object")
            parts = dict(zip(node.names, parts, strict=True))
        try:
            return put_together(node.kind, parts)
        except (ValueError, TypeError, AttributeError, ImportError, KeyError, RuntimeError) as error:
            raise ProtocolError(f"{node.kind[:60]!r} cannot be put together: {error}") from error


def _at(values: Sequence[Any], index: int, what: str) -> Any:
    if not 0 <= index < len(values):
        raise ProtocolError(f"there is no {what} {index}")
    return values[index]
