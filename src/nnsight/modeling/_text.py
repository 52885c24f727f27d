"""Text inputs: strings, token ids, chat messages, as rows of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError, LoadError
from ._encodings import Encoded, as_encoded

_TOKENIZER_OPTIONS = frozenset({"add_special_tokens", "truncation", "max_length"})
_NOT_FOR_THE_MODEL = frozenset({"special_tokens_mask", "length", "offset_mapping", "overflow_to_sample_mapping"})


def encode(value: Any, tokenizer: Any, options: dict[str, Any]) -> list[Encoded]:
    """Turn anything that stands for prompts into rows.

    Args:
        value: A string, a list of strings, chat messages (a list of mappings with `role`), a list of chats, token ids
            (a list of ints, or of lists of ints), a tensor `[seq]` or `[batch, seq]`, or an encoding.
        tokenizer: The model's tokenizer, None where there is none.
        options: Options of the tokenizer call.

    Raises:
        InputError: `value` is none of these, or empty.
    """
    if isinstance(value, str):
        return [_encode_text(value, tokenizer, options)]
    if isinstance(value, torch.Tensor):
        return [encode_ids(value)]
    if isinstance(value, Mapping) and "input_ids" in value:
        encoded = as_encoded(value, "input_ids")
        encode_ids(encoded.values["input_ids"])
        return [encoded]
    if isinstance(value, Sequence) and len(value):
        return _encode_sequence(value, tokenizer, options)
    raise InputError(_BAD_INPUT.format(kind=describe(value)))


def encode_ids(ids: torch.Tensor) -> Encoded:
    """Token ids `[seq]` or `[batch, seq]` as they stand."""
    if ids.is_floating_point() or ids.dim() not in (1, 2) or 0 in ids.shape:
        raise InputError(
            f"Token ids are whole numbers of shape [seq] or [batch, seq], not {ids.dtype} of shape {list(ids.shape)}."
        )
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    return Encoded(ids.shape[0], {"input_ids": ids})


def _encode_text(text: str, tokenizer: Any, options: dict[str, Any]) -> Encoded:
    if tokenizer is None:
        raise LoadError(
            "This model has no tokenizer, so it cannot take text: pass token ids, or tokenizer=… where you make the model."
        )
    found = tokenizer(text, **{name: options[name] for name in options if name in _TOKENIZER_OPTIONS})
    if not len(found["input_ids"]):
        raise InputError(f"The text {text!r} has no tokens: give the model at least one.")
    row = {name: torch.tensor([v]) for name, v in found.items() if name not in _NOT_FOR_THE_MODEL}
    if not any(found.get("token_type_ids", ())):
        row.pop("token_type_ids", None)  # what a model takes by itself, and GPT-2 would add an embedding for
    row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
    return Encoded(1, row)


def render_chat(messages: Any, tokenizer: Any, options: dict[str, Any]) -> str:
    """A conversation as the text that the model was trained on."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("This model's tokenizer has no chat template: pass the conversation as one string.")
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=options.get("add_generation_prompt", True)
    )


def is_chat(value: Any) -> bool:
    """Whether `value` is a list of messages."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, Mapping) and "role" in item for item in value)
    )


def _encode_sequence(value: Sequence[Any], tokenizer: Any, options: dict[str, Any]) -> list[Encoded]:
    first = value[0]
    if is_chat(value):
        text = render_chat(value, tokenizer, options)
        return [_encode_text(text, tokenizer, {**options, "add_special_tokens": False})]
    if isinstance(first, int):
        return [_with_mask(torch.tensor(list(value), dtype=torch.long))]
    if isinstance(first, torch.Tensor) and first.dim() == 0:
        return [_with_mask(torch.stack(list(value)))]
    return [row for item in value for row in encode(item, tokenizer, options)]


def _with_mask(ids: torch.Tensor) -> Encoded:
    rows, values = encode_ids(ids)
    return Encoded(rows, {**values, "attention_mask": torch.ones_like(values["input_ids"])})


def describe(value: Any) -> str:
    """What `value` is, for messages."""
    return "an empty list" if isinstance(value, Sequence) and not len(value) else f"a {type(value).__name__}"


_BAD_INPUT = """\
A language model cannot take {kind} as input. Give it text, a list of texts, chat messages \
([{{"role": "user", "content": ...}}]), token ids (a list or a tensor [seq] or [batch, seq]), or an encoding with \
input_ids."""
