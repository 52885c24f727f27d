"""What a worker and the confined process of a block say to each other: a message with a schema, and a tensor's bytes.

The worker asks and the process tells, one reply to each message.  What the process tells is taken for whatever it likes.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import torch

from ..errors import ProtocolError
from ..protocol import TensorInfo, TensorWriter, decode_message, read_tensors
from ._messages import Ask

_START = struct.Struct("<IQ")

Places = Annotated[
    list[int], msgspec.Meta(max_length=100_000)
]  # modules by their number among all, or one of those below
STEP_PLACE, SAMPLES_PLACE, RESULT_PLACE = -1, -2, -3


# --- from the worker ---------------------------------------------------------------------------------------------


class Progress(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """How the model went on for a request since the last message about it.

    `steps` began; `before` are the calls up to the last of their beginnings, `stood` the modules that ran then; `since` are
    the calls after it, `running` the modules that run now.
    """

    before: dict[int, int]
    steps: int
    stood: Places
    since: dict[int, int]
    running: Places


class Begin(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Run a job, which may print so many characters."""

    number: str
    frame: bytes
    printed: int


class GoOn(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The requests that were asked for are over: ids of prompt and continuation each, or why there are none."""

    progress: dict[str, Progress]
    results: list[tuple[list[int], list[int]] | str]


class Step(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A step begins."""

    lane: str
    progress: Progress


class Show(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The model stands at a place: a block waits there, or (`records`) a cache keeps the value.

    `form` says what is made of the tensor: itself (or None), the arguments of a call, or a model's output.  Where it is
    the value that a block left at the place `held`, no tensor comes; a second tensor is the call's input.
    """

    lane: str
    progress: Progress
    place: int
    kind: Literal["input", "output"]
    form: Literal["value", "inputs", "causal"]
    held: int | None
    records: bool


class Fail(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """What the block did cannot be had: it is to end with this error."""

    lane: str
    progress: Progress
    error: str
    text: str


class Sent(msgspec.Struct, forbid_unknown_fields=True):
    """A message of the worker's."""

    turn: int
    what: Begin | GoOn | Step | Show | Fail
    tensors: list[TensorInfo]


# --- from the process --------------------------------------------------------------------------------------------

Key = Annotated[str, msgspec.Meta(max_length=100)]


class State(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What the block of a request waits for, where that has changed."""

    lane: Key
    done: bool
    inputs: Places
    outputs: Places
    recorders: Places
    input_recorders: Places


class Told(msgspec.Struct, forbid_unknown_fields=True):
    """The reply to message number `turn`; `outcome` is what became of the value that was shown.

    Where the block is over it is `answered`, and the frame of its answer stands in a value's place.
    """

    turn: int
    states: Annotated[list[State], msgspec.Meta(max_length=10_000)]
    outcome: Literal["", "changed", "written", "skipped"] = ""
    tensors: Annotated[list[TensorInfo], msgspec.Meta(max_length=1)] = []
    asks: Annotated[list[Ask], msgspec.Meta(max_length=10_000)] = []
    answered: bool = False
    printed: Annotated[list[str], msgspec.Meta(max_length=500_000)] = []


_encode = msgspec.msgpack.Encoder().encode
_sent = msgspec.msgpack.Decoder(Sent)
_told = msgspec.msgpack.Decoder(Told)


def write(message: Sent | Told, tensors: Sequence[torch.Tensor] = (), answer: bytes = b"") -> bytes:
    """A message with its tensors, or with an answer."""
    writer = TensorWriter()
    for tensor in tensors:
        writer.add(tensor, data_only=True)
    message.tensors = writer.infos
    header, payload = _encode(message), answer or writer.payload()
    return b"".join([_START.pack(len(header), len(payload)), header, payload])


def receive_sent(end: socket.socket) -> tuple[Sent, list[torch.Tensor]]:
    """In the process: the worker's next message.

    Raises:
        EOFError: The worker is gone.
    """
    header, payload = _receive(end, (2**32, 2**62), None)
    sent = decode_message(header, _sent)
    return sent, read_tensors(sent.tensors, payload)


def receive_told(end: socket.socket, turn: int, most: tuple[int, int], deadline: float) -> tuple[Told, Any]:
    """In the worker: the reply to message number `turn`, whose parts may have `most` bytes each.

    Raises:
        EOFError: The process is gone.
        TimeoutError: It has not answered at the `deadline` (of `time.monotonic`).
        ProtocolError: It says what no such process says.
    """
    header, payload = _receive(end, most, deadline)
    return read_told(header, payload, turn)


def read_told(header: bytes, payload: bytes | bytearray, turn: int) -> tuple[Told, torch.Tensor | bytes | None]:
    """A reply, checked, with its tensor, which has numbers and nothing else, or its answer.

    Raises:
        ProtocolError: It is none.
    """
    told = decode_message(header, _told)
    if told.turn != turn:
        raise ProtocolError(f"it answers message {told.turn}, not {turn}")
    if any(info.kind != "tensor" or info.requires_grad or info.grad is not None for info in told.tensors):
        raise ProtocolError("a value is a plain tensor")
    if len(told.tensors) != bool(told.outcome):
        raise ProtocolError("a value that was changed comes with its numbers, and no other does")
    if told.answered and not told.tensors:
        return told, bytes(payload)
    tensors = read_tensors(told.tensors, payload)
    return told, tensors[0] if tensors else None


def _receive(end: socket.socket, most: tuple[int, int], deadline: float | None) -> tuple[bytes, bytearray]:
    sizes = _START.unpack(_exactly(end, _START.size, deadline))
    for size, limit in zip(sizes, most, strict=True):
        if size > limit:
            raise ProtocolError(f"a message of {size} bytes, of at most {limit}")
    return bytes(_exactly(end, sizes[0], deadline)), _exactly(end, sizes[1], deadline)


def _exactly(end: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            end.settimeout(left)
        try:
            count = end.recv_into(view[at:])
        except ConnectionError:
            count = 0
        if not count:
            raise EOFError("the process has ended")
        at += count
    return data
