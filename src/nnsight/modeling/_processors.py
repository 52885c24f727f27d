"""Processors: text, images, audio and encodings as a model takes them, through its tokenizer and its like."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import InputError, LoadError
from ..trace import Given
from ._encodings import Encoded, as_encoded, is_array
from ._text import describe, encode, is_chat, render_chat

RAW = ("text", "images", "audio", "videos")  # names under which a processor takes inputs
OPTIONS = frozenset({"add_special_tokens", "truncation", "max_length", "add_generation_prompt", "sampling_rate"})

_PARTS = {"text": "tokenizer", "images": "image_processor", "audio": "feature_extractor", "videos": "video_processor"}


def split_options(kwargs: dict[str, Any], *, generating: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments for the processor, and those for the forward; `max_length` is one of a generation's."""
    names = OPTIONS - {"max_length"} if generating else OPTIONS
    options = {name: kwargs[name] for name in kwargs if name in names}
    return options, {name: kwargs[name] for name in kwargs if name not in options}


def part_of(processor: Any, kind: str) -> Any:
    """The part of a processor that takes `kind` ("text", "images", "audio", "videos"), None where it has none."""
    if processor is None:
        return None
    from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase
    from transformers.image_processing_base import ImageProcessingMixin

    own = {"text": PreTrainedTokenizerBase, "images": ImageProcessingMixin, "audio": FeatureExtractionMixin}.get(kind)
    if own is not None and isinstance(processor, own):
        return processor
    single = isinstance(processor, (FeatureExtractionMixin, PreTrainedTokenizerBase, ImageProcessingMixin))
    return None if single else getattr(processor, _PARTS[kind], None)


class Reader:
    """Reads what a trace or an invoke was given.

    `main` is the argument that the model counts its rows by: `input_ids`, `pixel_values`, `input_features`, ….
    `processor` and `tokenizer` give the model's own, which are loaded when first needed.
    """

    def __init__(
        self,
        main: str,
        processor: Callable[[], Any],
        tokenizer: Callable[[], Any],
        options: dict[str, Any],
        *,
        pad_left: bool,
    ) -> None:
        self._main = main
        self._processor = processor
        self._tokenizer = tokenizer
        self._options = options
        self._padding_side = "left" if pad_left else "right"

    def read(self, given: Given) -> list[Encoded]:
        """Its rows, as encodings."""
        raw = {name: value for name, value in given.kwargs.items() if name in RAW and value is not None}
        named = {name: value for name, value in given.kwargs.items() if name not in RAW}
        parts = self._read_values(given.args, raw)
        if not named:
            return parts
        if not parts:
            return [as_encoded(named, self._main)]
        if len(parts) > 1:
            raise InputError(_NAMED.format(names=", ".join(named)))
        rows, values = parts[0]
        return [Encoded(rows, {**values, **as_encoded({**values, **named}, self._main).values})]

    def _read_values(self, values: tuple[Any, ...], raw: dict[str, Any]) -> list[Encoded]:
        kinds = [self._kind(value) for value in values]
        if raw or len({*kinds} - {None}) > 1:
            return [self._process(self._sorted(values, kinds, raw))]
        return [part for value, kind in zip(values, kinds, strict=True) for part in self._read(value, kind)]

    def _read(self, value: Any, kind: str | None) -> list[Encoded]:
        if isinstance(value, Mapping) and any(name in RAW for name in value):
            return self.read(Given((), dict(value)))
        if isinstance(value, Mapping):
            return [as_encoded(value, self._main)]
        if kind is None and is_array(value):
            value = torch.as_tensor(value)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return [self._read_tensor(value)]
        if is_chat(value) and _holds_media(value):
            return [self._process_chat(value)]
        if kind == "audio":
            clips = list(value) if _is_list_of_clips(value) else [value]
            return [self._process({"audio": clip}) for clip in clips]
        if kind is None or kind == "text":
            return self._read_text(value)
        return [self._process({kind: value})]

    def _read_text(self, value: Any) -> list[Encoded]:
        tokenizer = self._tokenizer() if _has_text(value) else None
        if tokenizer is None and self._main != "input_ids":
            raise InputError(_BAD_INPUT.format(kind=describe(value), main=self._main))
        return encode(value, tokenizer, self._options)

    def _read_tensor(self, value: torch.Tensor) -> Encoded:
        if self._main == "input_ids":
            raise InputError(
                f"Token ids are whole numbers of shape [seq] or [batch, seq], not {value.dtype} of shape {list(value.shape)}."
                " Give other tensors by name: trace(inputs_embeds=...)."
            )
        if value.dim() == _DIMS.get(self._main, 0) - 1:
            value = value.unsqueeze(0)
        return as_encoded({self._main: value}, self._main)

    def _kind(self, value: Any) -> str | None:
        """The sort of raw input that `value` is; None for text, ids, tensors and encodings, which tell by themselves."""
        first = _innermost(value)
        if isinstance(first, str) or is_chat(first):
            return "text"
        if _is_image(first):
            return "images"
        if isinstance(first, torch.Tensor):
            return "images" if first.dtype == torch.uint8 and first.dim() > 2 else None
        if is_array(first):
            audio = self._main in ("input_values", "input_features")
            return "audio" if audio else "images" if first.ndim > 2 or self._main == "pixel_values" else None
        return "audio" if isinstance(first, float) else None

    def _sorted(self, values: tuple[Any, ...], kinds: list[str | None], raw: dict[str, Any]) -> dict[str, Any]:
        """Positional and named raw inputs of one call of the processor."""
        found = dict(raw)
        for value, kind in zip(values, kinds, strict=True):
            if kind is None or kind in found:
                raise InputError(
                    f"{describe(value)} cannot stand beside {', '.join(found) or 'other inputs'} in one input: name the "
                    "inputs of the processor (text=..., images=..., audio=...), or give one encoding."
                )
            found[kind] = value
        return found

    def _process_chat(self, messages: Any) -> Encoded:
        """A conversation whose messages hold images or sounds."""
        processor = self._processor()
        if getattr(processor, "chat_template", None) is None:
            raise InputError("This model's processor has no chat template: pass the text and its images=... instead.")
        found = processor.apply_chat_template(
            list(messages),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=self._options.get("add_generation_prompt", True),
        )
        return as_encoded(found, self._main)

    def _process(self, raw: dict[str, Any]) -> Encoded:
        """Call the processor, or the part of it that takes the only kind of input there is."""
        single = next(iter(raw)) if len(raw) == 1 else None
        processor = self._processor()
        called = processor if single is None else part_of(processor, single)
        if called is None:
            raise LoadError(_NO_PROCESSOR.format(kinds=" and ".join(raw)))
        options: dict[str, Any] = {"return_tensors": "pt"}
        if "text" in raw:
            options |= {n: v for n, v in self._options.items() if n not in ("add_generation_prompt", "sampling_rate")}
            if is_chat(raw["text"]):
                raw = {**raw, "text": render_chat(raw["text"], _renderer(processor), self._options)}
                options["add_special_tokens"] = False
            if isinstance(raw["text"], (list, tuple)):
                options |= {"padding": True, "padding_side": self._padding_side}
        if "audio" in raw:
            extractor = part_of(processor, "audio")
            options["sampling_rate"] = self._options.get("sampling_rate", getattr(extractor, "sampling_rate", None))
        return as_encoded(called(**raw, **options) if single is None else called(raw[single], **options), self._main)


_DIMS = {"pixel_values": 4, "input_values": 2, "input_features": 3}


def _innermost(value: Any) -> Any:
    while isinstance(value, (list, tuple)) and value and not is_chat(value):
        value = value[0]
    return value


def _holds_media(messages: Any) -> bool:
    contents = [message["content"] for message in messages if not isinstance(message.get("content"), (str, type(None)))]
    return any(isinstance(item, Mapping) and item.get("type", "text") != "text" for items in contents for item in items)


def _renderer(processor: Any) -> Any:
    return processor if getattr(processor, "chat_template", None) is not None else part_of(processor, "text")


def _has_text(value: Any) -> bool:
    if isinstance(value, (list, tuple)) and not is_chat(value):
        return any(_has_text(item) for item in value)
    return isinstance(value, str) or is_chat(value)


def _is_list_of_clips(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not isinstance(value[0], (int, float))


def _is_image(value: Any) -> bool:
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


_NAMED = """\
{names} cannot be given beside several inputs at once: give each input in an invoke of its own, or everything as one \
encoding."""

_NO_PROCESSOR = """\
This model has no processor that takes {kinds}: pass processor=… where you make the model, or give it tensors by the \
names of its forward's arguments."""

_BAD_INPUT = """\
This model takes {main}, and has no processor that makes it of {kind}. Pass processor=… where you make the model, or \
give it tensors: trace({main}=...)."""
