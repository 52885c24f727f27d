"""Frames: a message, and the bytes of its tensors behind it, as one string of bytes that is checked when read."""

from __future__ import annotations

import struct
from typing import TypeVar

import msgspec

from ..errors import ProtocolError
from ._messages import VERSION, Answer, Failure, Job
from ._tensors import ALIGNMENT, TensorWriter, aligned

_MAGIC = b"NNS\x01"
_START = struct.Struct("<4sIQ")
HEADER_LIMIT = 64 * 2**20

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()
_job = msgspec.msgpack.Decoder(Job)
_outcome = msgspec.msgpack.Decoder(Answer | Failure)


def write_frame(message: msgspec.Struct, tensors: TensorWriter | None = None) -> bytes:
    """A message with its tensors."""
    header = _encoder.encode(message)
    payload = list(tensors.parts()) if tensors is not None else []
    size = sum(map(len, payload))
    padding = bytes(aligned(_START.size + len(header)) - _START.size - len(header))
    return b"".join([_START.pack(_MAGIC, len(header), size), header, padding, *payload])


def read_job(frame: bytes) -> tuple[Job, memoryview]:
    """The job in a frame, and the bytes of its tensors.

    Raises:
        ProtocolError: The bytes are no job, or one of another version.
    """
    job, payload = read_frame(frame, _job)
    if job.version != VERSION:
        raise ProtocolError(f"the job has protocol version {job.version}; this server speaks {VERSION}")
    return job, payload


def read_outcome(frame: bytes | memoryview) -> tuple[Answer | Failure, memoryview]:
    """The answer or failure in a frame, and the bytes of its tensors.

    Raises:
        ProtocolError: The bytes are neither.
    """
    return read_frame(frame, _outcome)


def read_frame(frame: bytes | memoryview, decoder: msgspec.msgpack.Decoder[M]) -> tuple[M, memoryview]:
    """A message of the kind that `decoder` reads, and the bytes of its tensors.

    Raises:
        ProtocolError: The bytes are none.
    """
    if len(frame) < _START.size:
        raise ProtocolError("the message is cut off before its header")
    magic, header_size, payload_size = _START.unpack_from(frame)
    if magic != _MAGIC:
        raise ProtocolError("these bytes are no message of this protocol")
    if header_size > HEADER_LIMIT:
        raise ProtocolError(f"the message's header is larger than {HEADER_LIMIT} bytes")
    start = aligned(_START.size + header_size)
    if len(frame) != start + payload_size or payload_size % ALIGNMENT:
        raise ProtocolError(f"the message has {len(frame)} bytes and says {start + payload_size}")
    view = memoryview(frame)
    return decode_message(bytes(view[_START.size : _START.size + header_size]), decoder), view[start:]


def decode_message(data: bytes, decoder: msgspec.msgpack.Decoder[M]) -> M:
    """A message without tensors, checked against its schema."""
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the message does not fit its schema: {error}") from error
