"""What the forward of a Hugging Face model needs: its arguments, padding, positions, the decoder's start."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch.nn import Module

from ._adapters import unwrapped
from ._encodings import Encoded, Padding, positions
from ._probe import Sampler, Special

_DECODER_INPUTS = {"labels", "decoder_input_ids", "decoder_inputs_embeds"}


class Needs:
    """Read from a module, its config and, where it is loaded, its tokenizer."""

    def __init__(self, module: Module, tokenizer: Any) -> None:
        self._module = module
        self._tokenizer = tokenizer
        self._config = getattr(module, "config", None)
        self.main: str = getattr(module, "main_input_name", "input_ids")
        self.has_decoder: bool = bool(getattr(self._config, "is_encoder_decoder", False))
        self.generates: bool = bool(getattr(module, "can_generate", lambda: False)())

    def takes(self, name: str) -> bool:
        """Whether the forward has an argument of this name."""
        return name in _arguments(type(unwrapped(self._module)))

    @property
    def pads_left(self) -> bool:
        """Whether sequences end together, so that the next token follows each."""
        return self.generates and not self.has_decoder

    @property
    def pad_id(self) -> int:
        """The token id that fills shorter rows."""
        for name in ("pad_token_id", "eos_token_id"):
            for owner in (self._tokenizer, self._config):
                found = getattr(owner, name, None)
                if isinstance(found, int) and found >= 0:
                    return found
        return 0

    def padding(self) -> Padding:
        """How rows of different lengths become one batch."""
        refusal = None
        if getattr(self._config, "feat_extract_norm", None) == "group":
            refusal = _GROUP_NORM
        elif not self.takes("attention_mask") and not _takes_anything(type(unwrapped(self._module))):
            refusal = _NO_MASK.format(kind=type(self._module).__name__)
        return Padding(self.pad_id, self.pads_left, refusal)

    def complete(self, inputs: dict[str, Any], given: dict[str, Any], *, padded: bool) -> dict[str, Any]:
        """`inputs` with the positions of padded rows, and a start for the decoder, unless `given` has its own."""
        mask = inputs.get("attention_mask")
        if padded and self.pads_left and isinstance(mask, torch.Tensor) and mask.dim() == 2:
            own = hasattr(self._module, "get_rope_index") or hasattr(
                getattr(self._module, "model", None), "get_rope_index"
            )
            if self.takes("position_ids") and not own:
                inputs.setdefault("position_ids", positions(mask))
        if self.starts_decoder and not (inputs.keys() | given.keys()) & _DECODER_INPUTS:
            main = inputs.get(self.main, inputs.get("inputs_embeds"))
            if isinstance(main, torch.Tensor):
                inputs["decoder_input_ids"] = self._decoder_start(main)
        return self.place(inputs)

    def place(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The tensors of `inputs` on the device where the model takes them."""
        device = self.device()
        return {n: v.to(device) if device and isinstance(v, torch.Tensor) else v for n, v in inputs.items()}

    @property
    def starts_decoder(self) -> bool:
        """Whether the forward wants the decoder's first token, which `generate` makes by itself."""
        return self.has_decoder and self.generates and self.takes("decoder_input_ids")

    def _decoder_start(self, main: torch.Tensor) -> torch.Tensor:
        start = getattr(self._config, "decoder_start_token_id", None)
        return torch.full((main.shape[0], 1), self.pad_id if start is None else start, device=main.device)

    def sampler(self, parts: Sequence[Encoded], *, padded: bool) -> Sampler:
        """Rows like those of `parts`, for trials."""
        part = min(parts, key=lambda part: (not part.attached, _size(part)))
        text = getattr(self._config, "text_config", None)
        special = Special.of(self._tokenizer, self._config, text)
        pad = self.pad_id if padded and self.takes("attention_mask") else None
        return Sampler(part, special, self._vocabulary(part), pad=pad, pad_left=self.pads_left)

    def _vocabulary(self, part: Encoded) -> int:
        """How many token ids there are, as far as is known."""
        text = getattr(self._config, "text_config", None)
        found = getattr(text or self._config, "vocab_size", None)
        if isinstance(found, int):
            return found
        embeddings = getattr(self._module, "get_input_embeddings", lambda: None)()
        ids = part.values.get("input_ids")
        least = int(ids.max()) + 1 if isinstance(ids, torch.Tensor) and not ids.is_meta else 1
        return getattr(embeddings, "num_embeddings", least)

    def device(self) -> torch.device | None:
        """Where inputs belong; of a model that is spread over devices or kept on disk, where its first part computes."""
        if hasattr(self._module, "hf_device_map"):
            for module in self._module.modules():
                found = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
                if found is not None:
                    return torch.device(found)
        tensor = next(chain(self._module.parameters(), self._module.buffers()), None)
        return None if tensor is None or tensor.is_meta else tensor.device  # a scan needs the inputs' whole numbers


@functools.cache
def _arguments(kind: type[Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


@functools.cache
def _takes_anything(kind: type[Module]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(kind.forward).parameters.values())


def _size(part: Encoded) -> int:
    return sum(value.numel() for value in part.values.values() if isinstance(value, torch.Tensor))


_NO_MASK = """\
The inputs of this trace have different lengths, and {kind} takes no mask, so that padding would change its results: \
bring them to one length, or trace them one by one."""

_GROUP_NORM = """\
The clips of this trace have different lengths, and this model normalises over the whole clip, padding included, so that \
padding would change its results: bring them to one length, or trace them one by one."""
