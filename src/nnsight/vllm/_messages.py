"""What the engine's worker and the process of the user say to each other, beside jobs and answers."""

from __future__ import annotations

from typing import Any

import msgspec


class Ask(msgspec.Struct, forbid_unknown_fields=True):
    """A request that a job needs: a text, token ids or chat messages, with its sampling parameters.

    `key` comes back with the request, so that the worker knows it.  A request that is not `attended` has no block that
    sees its values: the engine may treat it as any other, but for a `salt` where a spec changes its tokens, which is for
    prompts of the same length only where `by_length`.
    """

    key: str
    prompt: Any
    params: dict[str, Any]
    attended: bool = True
    salt: str = ""
    by_length: bool = False

    def extra(self) -> dict[str, str]:
        """What goes with the request."""
        if self.attended:
            return {EXTRA: self.key}
        return {SPEC: self.key} if self.salt else {}

    def salted(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """The prompt with a salt: a request finds cached tokens, and leaves some, only where the same changes made them."""
        if self.attended:
            return {**prompt, "cache_salt": self.key}
        length = f":{len(prompt['prompt_token_ids'])}" if self.by_length else ""
        return {**prompt, "cache_salt": f"{SPEC}:{self.salt}{length}"} if self.salt else prompt


class Reply(msgspec.Struct, forbid_unknown_fields=True):
    """How far a job is: what it asks for next, or the frame of its answer; and what it has printed since."""

    asks: list[Ask] = []
    answer: bytes | None = None
    printed: list[str] = []


encode = msgspec.msgpack.Encoder().encode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
EXTRA = "nnsight"  # the name of a request's key among its `extra_args`
SPEC = "nnsight_spec"  # the same, of a request with a spec and no block
