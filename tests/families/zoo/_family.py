"""What is known of a family: how to build it small, where its parts are, and what it is fed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn import Module

VOCABULARY = 120
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """A row of the table of families.

    Args:
        name: As in the table.
        make: Builds the model from its config; its weights are replaced by `build`.
        blocks: Path of the list of blocks.
        attention: Path of a module whose forward is the attention, or what stands in its place.
        routers: Paths of the routers and of the experts of a mixture, in one layer.
        head: Path of the module that gives logits.
        decoder: Path of the list of blocks that run at every step of a generation, where it is another than `blocks`.
        kind: "decoder", "encoder" or "encoder-decoder" take token ids, "vision-language" these and images, "pipeline" a
            prompt, "tensors" anything else.
        example: Keyword inputs of the forward for so many rows; None means token ids.
        refuses: Patterns of the places whose rows cannot be told apart in a batch, which are refused by name.
        differs: Patterns of the places whose shapes in a scan are other than in a run.
        operations: The operation that calls a module in the attention's forward, where it is not the first by its name.
        reasons: For a capability that the family has not, why.
    """

    name: str
    make: Callable[[], Any]
    blocks: str
    attention: str
    routers: tuple[str, ...] = ()
    head: str = "lm_head"
    decoder: str = ""
    kind: str = "decoder"
    example: Callable[[int], Inputs] | None = None
    refuses: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    operations: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def takes_text(self) -> bool:
        return self.kind in ("decoder", "encoder", "encoder-decoder")

    @property
    def pads_left(self) -> bool:
        return self.kind in ("decoder", "vision-language")

    @property
    def generates(self) -> bool:
        return "generate" not in self.reasons

    @property
    def steps(self) -> str:
        return self.decoder or self.blocks

    def may_refuse(self, place: str) -> bool:
        return any(fnmatchcase(place, pattern) for pattern in self.refuses)

    def may_differ(self, place: str) -> bool:
        return any(fnmatchcase(place, pattern) for pattern in self.differs)


def build(family: Family) -> Module:
    """The model of a family, the same each time, in eval mode, with no parameter at zero or one."""
    torch.manual_seed(0)
    return enliven(family.make().eval())


def enliven(model: Module) -> Module:
    """`model` with noise on every parameter, and on buffers that are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(_noise(parameter, generator))
        for buffer in model.buffers():
            if buffer.is_floating_point() and not buffer.any():
                buffer.add_(_noise(buffer, generator))
    return model


def _noise(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.dim() < 2:
        scale = 0.2
    else:  # the last of two dimensions is what is summed over, or the first; all but the first in a convolution
        scale = 1 / math.sqrt(max(tensor.shape[-2:]) if tensor.dim() < 4 else tensor.numel() / tensor.shape[0])
    return torch.randn(tensor.shape, generator=generator) * scale


def inputs(family: Family, rows: int = 2, length: int = 9, seed: int = 0) -> Inputs:
    """Keyword inputs of the family's forward, `rows` of them and different, the same each time."""
    torch.manual_seed(100 + seed)
    if family.example is not None:
        return family.example(rows)
    ids = torch.randint(3, VOCABULARY, (rows, length))
    more = {"decoder_input_ids": torch.randint(3, VOCABULARY, (rows, 5))} if family.kind == "encoder-decoder" else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def prompts(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    """Token ids of so many prompts, of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
