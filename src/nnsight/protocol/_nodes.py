"""The form of values on the wire: a tree of plain parts and of the nodes below, decoded against this schema."""

from __future__ import annotations

from typing import Any, Union

import msgspec


class Node(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a msgpack document has no form of its own for."""


class TensorNode(Node, frozen=True, tag="tensor"):
    """Number `index` of the message's tensors."""

    index: int


class ListNode(Node, frozen=True, tag="list"):
    items: list[Value]


class SetNode(Node, frozen=True, tag="set"):
    items: list[Value]


class DictNode(Node, frozen=True, tag="dict"):
    """Pairs of key and value; `ordered` is an `OrderedDict`."""

    items: list[tuple[Value, Value]]
    ordered: bool = False


class HeldNode(Node, frozen=True, tag="held"):
    """Number `index` of the message's containers, which several values may hold."""

    index: int


class TupleNode(Node, frozen=True, tag="tuple"):
    items: list[Value]


class FrozenSetNode(Node, frozen=True, tag="frozenset"):
    items: list[Value]


class AtomNode(Node, frozen=True, tag="atom"):
    """A value that its text says all about; see `_atoms`."""

    kind: str
    text: str


class BytesNode(Node, frozen=True, tag="bytes"):
    data: bytes


class SliceNode(Node, frozen=True, tag="slice"):
    start: Value
    stop: Value
    step: Value


class PartsNode(Node, frozen=True, tag="parts"):
    """An object of a library that both sides have, in parts (named, or in order); see `modeling.take_apart`."""

    kind: str
    names: list[str]
    items: list[Value]


class LostNode(Node, frozen=True, tag="lost"):
    """A part of a value that could not travel, and why."""

    reason: str


class EnvoyNode(Node, frozen=True, tag="envoy"):
    """A module of one of the job's models, or with `attribute` something of the model's own."""

    model: int
    path: str
    attribute: str = ""


class SiteNode(Node, frozen=True, tag="site"):
    """A value of the vocabulary of the job's first model; see `names.Site`."""

    name: str
    layer: int | None
    stack: str


class ImportNode(Node, frozen=True, tag="import"):
    """A module, or an object in it, that the server imports by name."""

    module: str
    name: str


class DefinitionNode(Node, frozen=True, tag="definition"):
    """Number `index` of the functions and classes that the job brings as source."""

    index: int


class ModuleNode(Node, frozen=True, tag="module"):
    """A registered module, which the job brings as source."""

    name: str


class InstanceNode(Node, frozen=True, tag="instance"):
    """An object of a class that both sides have, or that the job brings, with its attributes."""

    cls: Value
    state: list[tuple[str, Value]]


class GivenNode(Node, frozen=True, tag="given"):
    """In an answer: what the job sent as container or tensor number `index`."""

    index: int
    tensor: bool


Nodes = Union[  # noqa: UP007  msgspec reads it
    TensorNode,
    HeldNode,
    TupleNode,
    FrozenSetNode,
    AtomNode,
    BytesNode,
    SliceNode,
    PartsNode,
    LostNode,
    EnvoyNode,
    SiteNode,
    ImportNode,
    DefinitionNode,
    ModuleNode,
    GivenNode,
]
Value = Union[None, bool, int, float, str, Nodes]  # noqa: UP007
Container = Union[ListNode, SetNode, DictNode, InstanceNode]  # noqa: UP007
Tree = Any  # a `Value`; the recursive type is for msgspec
