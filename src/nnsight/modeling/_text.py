"""Text inputs: strings, token ids, tensors, encodings and chat messages, as one batch of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import InputError, LoadError
from ..trace import Given

_TOKENIZER_OPTIONS = frozenset({"add_special_tokens", "truncation", "max_length", "add_generation_prompt"})


class Row(NamedTuple):
    """One prompt: its token ids `[seq]` and attention mask `[seq]`."""

    ids: torch.Tensor
    mask: torch.Tensor


class Encoded(NamedTuple):
    """One input as rows; `given` is an encoding of the user's own, to be passed on as it is when alone."""

    rows: list[Row]
    given: dict[str, Any] | None


def split_options(kwargs: dict[str, Any], *, generating: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments for the tokenizer, and those for the forward; `max_length` is one of a generation's."""
    names = _TOKENIZER_OPTIONS - {"max_length"} if generating else _TOKENIZER_OPTIONS
    options = {name: kwargs[name] for name in kwargs if name in names}
    return options, {name: kwargs[name] for name in kwargs if name not in options}


def encode(value: Any, tokenizer: Any, options: dict[str, Any]) -> Encoded:
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
        return Encoded([_encode_text(value, tokenizer, options)], None)
    if isinstance(value, torch.Tensor):
        return Encoded(_tensor_rows(value, None), None)
    if isinstance(value, Mapping) and "input_ids" in value:
        given = {name: torch.as_tensor(item) if _is_numbers(item) else item for name, item in value.items()}
        given = {n: i.unsqueeze(0) if isinstance(i, torch.Tensor) and i.dim() == 1 else i for n, i in given.items()}
        return Encoded(_tensor_rows(given["input_ids"], given.get("attention_mask")), given)
    if isinstance(value, Sequence) and len(value):
        return Encoded(_sequence_rows(value, tokenizer, options), None)
    raise InputError(_BAD_INPUT.format(kind=_describe(value)))


def given_values(given: Given) -> tuple[Any, ...]:
    """The prompts of a trace or an invoke; `input_ids=…` as a keyword is an encoding."""
    return (*given.args, given.kwargs) if given.kwargs else given.args


def is_plain_ids(given: Given) -> bool:
    """Whether an input is one tensor of token ids, which the model takes as it stands."""
    if given.kwargs or len(given.args) != 1 or not isinstance(given.args[0], torch.Tensor):
        return False
    ids = given.args[0]
    return not ids.is_floating_point() and ids.dim() in (1, 2) and ids.numel() > 0


def make_batch(inputs: Sequence[Encoded], pad_id: int, *, pad_left: bool) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[batch, seq]` of all rows, padded to the longest."""
    rows = [row for encoded in inputs for row in encoded.rows]
    length = max(row.ids.shape[0] for row in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        size = row.ids.shape[0]
        place = slice(length - size, length) if pad_left else slice(0, size)
        ids[i, place] = row.ids.to(ids.device)
        mask[i, place] = row.mask.to(mask.device)
    return {"input_ids": ids, "attention_mask": mask}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token `[batch, seq]` counted from its row's first real token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _encode_text(text: str, tokenizer: Any, options: dict[str, Any]) -> Row:
    if tokenizer is None:
        raise LoadError(
            "This model has no tokenizer, so it cannot take text: pass token ids, or LanguageModel(tokenizer=…)."
        )
    ids = tokenizer(text, **{k: v for k, v in options.items() if k != "add_generation_prompt"})["input_ids"]
    if not len(ids):
        raise InputError(f"The text {text!r} has no tokens: give the model at least one.")
    return _row(torch.tensor(ids, dtype=torch.long))


def _encode_chat(messages: Any, tokenizer: Any, options: dict[str, Any]) -> Row:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("This model's tokenizer has no chat template: pass the conversation as one string.")
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=options.get("add_generation_prompt", True)
    )
    return _encode_text(text, tokenizer, {**options, "add_special_tokens": False})


def _sequence_rows(value: Sequence[Any], tokenizer: Any, options: dict[str, Any]) -> list[Row]:
    first = value[0]
    if all(isinstance(item, str) for item in value):
        return [_encode_text(item, tokenizer, options) for item in value]
    if all(isinstance(item, Mapping) and "role" in item for item in value):
        return [_encode_chat(value, tokenizer, options)]
    if isinstance(first, int):
        return [_row(torch.tensor(list(value), dtype=torch.long))]
    if isinstance(first, torch.Tensor) and first.dim() == 0:
        return [_row(torch.stack(list(value)))]
    return [row for item in value for row in encode(item, tokenizer, options).rows]


def _tensor_rows(ids: torch.Tensor, mask: torch.Tensor | None) -> list[Row]:
    if ids.is_floating_point() or ids.dim() not in (1, 2) or 0 in ids.shape:
        raise InputError(
            f"Token ids are whole numbers of shape [seq] or [batch, seq], not {ids.dtype} of shape {list(ids.shape)}."
        )
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if mask is None:
        return [_row(row) for row in ids]
    return [Row(row, kept) for row, kept in zip(ids, torch.as_tensor(mask), strict=True)]


def _row(ids: torch.Tensor) -> Row:
    return Row(ids, torch.ones_like(ids))


def _is_numbers(item: Any) -> bool:
    return isinstance(item, (list, tuple))


def _describe(value: Any) -> str:
    return "an empty list" if isinstance(value, Sequence) and not len(value) else f"a {type(value).__name__}"


_BAD_INPUT = """\
A language model cannot take {kind} as input. Give it text, a list of texts, chat messages \
([{{"role": "user", "content": ...}}]), token ids (a list or a tensor [seq] or [batch, seq]), or an encoding with \
input_ids."""
