"""Encodings: what a processor makes of inputs, joined into one batch, and cut for trial runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import InputError

MASKS = {
    "input_ids": "attention_mask",
    "inputs_embeds": "attention_mask",
    "input_values": "attention_mask",
    "input_features": "attention_mask",
    "decoder_input_ids": "decoder_attention_mask",
}
# Dimension that is as long as the sequence, and what fills it up.  `input_ids` take the model's padding id.
_SEQUENCES: dict[str, tuple[int, float]] = {
    "input_ids": (-1, 0),
    "decoder_input_ids": (-1, 0),
    "attention_mask": (-1, 0),
    "decoder_attention_mask": (-1, 0),
    "token_type_ids": (-1, 0),
    "mm_token_type_ids": (-1, 0),
    "special_tokens_mask": (-1, 1),
    "position_ids": (-1, 0),
    "labels": (-1, -100),
    "input_values": (-1, 0.0),
    "input_features": (1, 0.0),
    "inputs_embeds": (1, 0.0),
}
_ATTACHED = ("pixel_", "image_", "images_", "video_", "videos_")
_IDS = ("input_ids", "decoder_input_ids")
_OF_ZEROS = ("token_type_ids", "mm_token_type_ids")  # what a model takes where they are not given


class Encoded(NamedTuple):
    """Some rows of a batch: by name of the forward's argument, tensors `[rows, ...]` or what is no tensor."""

    rows: int
    values: dict[str, Any]

    @property
    def attached(self) -> list[str]:
        """Names of tensors that count images or the like, of which a row of text may have any number."""
        return [name for name in self.values if name.startswith(_ATTACHED)] if "input_ids" in self.values else []

    @property
    def units(self) -> dict[str, int]:
        """How much of each there is."""
        return {name: self.values[name].shape[0] for name in self.attached}


class Padding(NamedTuple):
    """How a model's sequences are made equally long; `refusal` says why they cannot be."""

    id: int
    left: bool
    refusal: str | None = None


def as_encoded(values: Mapping[str, Any], main: str) -> Encoded:
    """An encoding of the user's own: lists become tensors, and a missing batch dimension of ids is added."""
    tensors = {
        name: torch.as_tensor(v) if isinstance(v, (list, tuple)) or is_array(v) else v for name, v in values.items()
    }
    ids = tensors.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.dim() == 1:
        tensors = {
            name: v.unsqueeze(0) if isinstance(v, torch.Tensor) and v.dim() == 1 else v for name, v in tensors.items()
        }
    return Encoded(_rows_of(tensors, main), tensors)


def is_array(value: Any) -> bool:
    """Whether `value` is an array of numpy's kind."""
    return hasattr(value, "__array_interface__") and hasattr(value, "ndim")


def _rows_of(values: Mapping[str, Any], main: str) -> int:
    for name in ("input_ids", "inputs_embeds", main, *values):
        value = values.get(name)
        if isinstance(value, torch.Tensor) and value.dim():
            if 0 in value.shape:
                raise InputError(f"{name} of shape {list(value.shape)} is empty: give the model at least one row.")
            return value.shape[0]
    raise InputError(f"An encoding needs {main}, a tensor with the rows of the batch in front.")


def join(parts: Sequence[Encoded], padding: Padding) -> dict[str, Any]:
    """The arguments of one forward on all rows; a single part passes as it is."""
    if len(parts) == 1:
        return dict(parts[0].values)
    names = list(dict.fromkeys(name for part in parts for name in part.values))
    lengths = {name: [_length(part.values.get(name), name) for part in parts] for name in names if name in _SEQUENCES}
    padded = [name for name in lengths if len({n for n in lengths[name] if n is not None}) > 1]
    if padded and padding.refusal:
        raise InputError(padding.refusal)
    masks = [mask for name in padded if (mask := MASKS.get(name)) and mask not in names]
    return {name: _join_one(name, parts, padding) for name in dict.fromkeys((*names, *masks))}


def _length(value: Any, name: str) -> int | None:
    return value.shape[_SEQUENCES[name][0]] if isinstance(value, torch.Tensor) and value.dim() > 1 else None


def _join_one(name: str, parts: Sequence[Encoded], padding: Padding) -> Any:
    values: list[Any] = [part.values[name] if name in part.values else _implied(name, part) for part in parts]
    if name.startswith(_ATTACHED) and any("input_ids" in part.values for part in parts):
        values = [value for value in values if value is not None]
    if any(value is None for value in values):
        raise InputError(_SOME.format(name=name))
    if not all(isinstance(value, torch.Tensor) for value in values):
        if all(value is values[0] or (not _is_tensor(value) and value == values[0]) for value in values):
            return values[0]
        raise InputError(_DIFFERENT.format(name=name))
    if name in _SEQUENCES and values[0].dim() > 1:
        dim, fill = _SEQUENCES[name]
        values = _pad(values, dim, padding.id if name in _IDS else fill, left=padding.left)
    try:
        return torch.cat([value.to(values[0].device) for value in values])
    except RuntimeError as error:
        shapes = ", ".join(str(list(value.shape)) for value in values)
        raise InputError(_SHAPES.format(name=name, shapes=shapes)) from error


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _implied(name: str, part: Encoded) -> torch.Tensor | None:
    """What a part that does not give `name` means by that."""
    if name in _OF_ZEROS and "input_ids" in part.values:
        return torch.zeros_like(part.values["input_ids"])
    for main, mask in MASKS.items():
        value = part.values.get(main)
        if mask == name and isinstance(value, torch.Tensor):
            shape = value.shape[: 1 + _SEQUENCES[main][0] % value.dim()]
            return torch.ones(shape, dtype=torch.long, device=value.device)
    return None


def _pad(values: list[torch.Tensor], dim: int, fill: float, *, left: bool) -> list[torch.Tensor]:
    longest = max(value.shape[dim] for value in values)
    padded = []
    for value in values:
        missing = longest - value.shape[dim]
        if missing:
            shape = list(value.shape)
            shape[dim] = missing
            filled = value.new_full(shape, fill)
            value = torch.cat([filled, value] if left else [value, filled], dim)
        padded.append(value)
    return padded


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token `[batch, seq]` counted from its row's first real token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


_SOME = """\
Only some of the invokes of this trace give {name}: give it to each of them, or trace these inputs one by one."""

_DIFFERENT = """\
The invokes of one trace give different values of {name} where one value serves the whole batch: pass it to trace() \
instead, or trace the inputs one by one."""

_SHAPES = """\
The invokes of one trace give {name} of shapes {shapes}, which make no batch: bring them to one size, or trace them one \
by one."""
