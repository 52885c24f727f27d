"""What a block and the model that it sees from outside say to each other, where they are in two processes.

The block's side asks for places one after the other; with each question it says what it has made of the values it was
shown last. A leaf is a tensor or an object in a shown value, numbered through in the order of `leaves_of`.
"""

from __future__ import annotations

from typing import Any, NoReturn

import msgspec
import torch

from ..errors import ProtocolError, TravelError
from ..protocol import Container, Decoder, Encoder, LostNode, Node, PartsNode, TensorInfo, Tree, Value

INPUTS = ("input_ids", "attention_mask")  # of a model that is shared: whole numbers of one shape
LARGEST = 2**26  # bytes of a message


class Begin(msgspec.Struct, tag="begin", array_like=True, forbid_unknown_fields=True):
    """What the model is to be called with: the names of `INPUTS` that there are, a tensor each."""

    names: list[str]
    grad: bool
    inference: bool
    tensors: list[TensorInfo]


class Said(msgspec.Struct, tag="said", array_like=True, forbid_unknown_fields=True):
    """The place that a block wants next, None at its end, and what it has made of the values it was shown.

    `changed` are the leaves that it has changed in place, each with the tensor that has the numbers now; `value` is what
    it has put in place of the shown value, or for the call, where it has.
    """

    place: int | None
    is_input: bool
    changed: dict[int, int]
    done: str  # "written", "skipped" or neither
    value: Value
    contents: list[Container]
    tensors: list[TensorInfo]


class Shown(msgspec.Struct, tag="shown", array_like=True, forbid_unknown_fields=True):
    """A value."""

    value: Value
    contents: list[Container]
    tensors: list[TensorInfo]


read_told = msgspec.msgpack.Decoder(Begin | Said)
read_shown = msgspec.msgpack.Decoder(Shown)


class AloneError(Exception):
    """What is asked for needs the model in the block's own process."""


class Elsewhere:
    """Stands for an object of the model's that stays in its process: it can be handed back, and not be looked at."""

    __slots__ = ()

    def __getattr__(self, name: str) -> NoReturn:
        raise AloneError(f"an object of the model's is asked for {name}")

    def _refuse(self, *_: object) -> NoReturn:
        raise AloneError("an object of the model's is looked at")

    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __setitem__ = __call__ = __repr__ = __str__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse


class ShowingEncoder(Encoder):
    """Leaves out objects that cannot travel, and the tensors with the ids in `withheld`."""

    def __init__(self, withheld: set[int]) -> None:
        super().__init__()
        self._withheld = withheld

    def _tensor(self, value: torch.Tensor) -> Tree:
        return LostNode("it is withheld") if id(value) in self._withheld else super()._tensor(value)

    def _object(self, value: Any) -> Tree:
        try:
            return super()._object(value)
        except TravelError as error:
            return LostNode(str(error))


class ShownDecoder(Decoder):
    """Makes what the host shows."""

    def _decode(self, node: Node) -> Any:
        return Elsewhere() if isinstance(node, LostNode) else super()._decode(node)


def leaves_of(value: Any) -> list[Any]:
    """The tensors and objects in a value, in an order that is the same at both sides."""
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves_of(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves_of(item)]
    return [value]


class PlainDecoder(Decoder):
    """Makes tensors and plain containers, no object of a library."""

    def _together(self, node: PartsNode) -> Any:
        raise ProtocolError(f"a {node.kind[:60]} has no place here")


def check_like(value: torch.Tensor, other: Any) -> None:
    """Refuse a tensor that cannot stand for another one."""
    if not isinstance(other, torch.Tensor) or value.shape != other.shape or value.dtype is not other.dtype:
        raise ProtocolError("a value was changed to another shape or type")
