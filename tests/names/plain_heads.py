"""The oracle for heads: the attention functions of a plain eager model, recorded and changed by patching them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn import Module

from .cases import Case, blocks, build

# Where the attention of a layer is, the module that is given to the attention function.
ATTENTION = {
    "gpt2": "attn",
    "gptj": "attn",
    "gpt_neox": "attention",
    "gpt_neox_serial": "attention",
    "bloom": "self_attention",
    "falcon": "self_attention",
    "falcon_grouped": "self_attention",
    "falcon_alibi": "self_attention",
    "t5-encoder": "layer.0.SelfAttention",
    "t5-decoder": "layer.0.SelfAttention",
    "t5_gated-encoder": "layer.0.SelfAttention",
    "t5_gated-decoder": "layer.0.SelfAttention",
    "bert": "attention.self",
    "roberta": "attention.self",
    "modernbert": "attn",
    "vit": "attention",
}
DROPOUTS = {"gptj": "attn_dropout", "bloom": "attention_dropout"}
EAGER_ONLY = {"gptj", "bloom", "gpt_oss", "gemma2"}

Edit = Callable[[torch.Tensor], torch.Tensor]


def attention_of(case: Case, net: Module, layer: int) -> Module | None:
    """The attention of a layer, None where the layer has another kind of mixer."""
    try:
        return blocks(case, net)[layer].get_submodule(ATTENTION.get(case.name, "self_attn"))
    except AttributeError:
        return None


def eager(case: Case) -> Module:
    """The same model, computing attention with its probabilities."""
    return build(case, attn_implementation="eager")


class Attended:
    """What the attention functions of one forward were given and gave, by module."""

    def __init__(self) -> None:
        self.q: dict[Module, torch.Tensor] = {}
        self.k: dict[Module, torch.Tensor] = {}
        self.v: dict[Module, torch.Tensor] = {}
        self.pattern: dict[Module, torch.Tensor] = {}
        self.unrotated: list[tuple[torch.Tensor, torch.Tensor]] = []


@contextmanager
def recorded(net: Module, edits: dict[tuple[Module, str], Edit] | None = None) -> Iterator[Attended]:
    """Record the model's eager attention function.

    `edits` change what a module's function is given as `q`, `k`, `v`, `[batch, pos, head, d_head]`, or its `pattern`.
    """
    found, edits = Attended(), edits or {}
    homes = {
        sys.modules[type(module).__module__] for module in net.modules() if type(module).__name__.endswith("Attention")
    }
    with ExitStack() as stack:
        for home in homes:
            for name, function in _patches(home, found, edits).items():
                stack.enter_context(mock.patch.object(home, name, function))
        for path, module in net.named_modules():
            if path.rpartition(".")[2] in DROPOUTS.values():
                around = net.get_submodule(path.rpartition(".")[0])
                stack.callback(module.register_forward_pre_hook(_at_dropout(found, edits, around)).remove)
        yield found


def _patches(home: Any, found: Attended, edits: dict[tuple[Module, str], Edit]) -> dict[str, Any]:
    patches: dict[str, Any] = {}
    attend = getattr(home, "eager_attention_forward", None)
    rotate = getattr(home, "apply_rotary_pos_emb", None)

    def attending(module: Module, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        found.q[module], found.k[module], found.v[module] = (t.transpose(1, 2).clone() for t in (q, k, v))
        q, k, v = (
            _edited(edits, (module, name), t.transpose(1, 2)).transpose(1, 2)
            for name, t in zip("qkv", (q, k, v), strict=True)
        )
        output, weights = attend(module, q, k, v, *args, **kwargs)
        found.pattern[module] = weights.clone()
        if (module, "pattern") in edits:
            weights = _edited(edits, (module, "pattern"), weights)
            values = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
            output = (weights @ values).transpose(1, 2).contiguous()
        return output, weights

    def rotating(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        found.unrotated.append((q.transpose(1, 2).clone(), k.transpose(1, 2).clone()))
        return rotate(q, k, *args, **kwargs)

    if attend is not None:
        patches["eager_attention_forward"] = attending
    if rotate is not None and "gptj" not in home.__name__:
        patches["apply_rotary_pos_emb"] = rotating
    return patches


def _at_dropout(found: Attended, edits: dict[Module, Edit], module: Module) -> Any:
    def hook(_: Module, args: tuple[Any, ...]) -> Any:
        found.pattern[module] = args[0].clone()
        return (_edited(edits, (module, "pattern"), args[0]), *args[1:])

    return hook


def _edited(edits: dict[tuple[Module, str], Edit], key: tuple[Module, str], value: torch.Tensor) -> torch.Tensor:
    return edits[key](value.clone()) if key in edits else value
