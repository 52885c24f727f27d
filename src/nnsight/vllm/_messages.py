"""What the engine's worker and the process of the user say to each other, beside jobs and answers."""

from __future__ import annotations

from typing import Any

import msgspec


class Ask(msgspec.Struct, forbid_unknown_fields=True):
    """A request that a job needs: a text, token ids or chat messages, with its sampling parameters.

    `key` comes back with the request, so that the worker knows it.
    """

    key: str
    prompt: Any
    params: dict[str, Any]


class Reply(msgspec.Struct, forbid_unknown_fields=True):
    """How far a job is: what it asks for next, or the frame of its answer; and what it has printed since."""

    asks: list[Ask] = []
    answer: bytes | None = None
    printed: list[str] = []


encode = msgspec.msgpack.Encoder().encode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
EXTRA = "nnsight"  # the name of a request's key among its `extra_args`
