"""Hooks: the names TransformerLens has for values, as sites."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import NamesError
from ._site import Site, find_site

if TYPE_CHECKING:
    from ._vocabulary import Vocabulary

_IN_BLOCK = re.compile(r"blocks\.(-?\d+)\.(.+)")

_BLOCK = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_q": "head_q",
    "attn.hook_k": "head_k",
    "attn.hook_v": "head_v",
    "attn.hook_rot_q": "head_q_rot",
    "attn.hook_rot_k": "head_k_rot",
    "attn.hook_pattern": "head_pattern",
    "attn.hook_z": "head_z",
    "attn.hook_result": "head_result",
    "mlp.hook_post": "neurons",
}
_WHOLE = {"hook_embed": "embed", "ln_final.hook_normalized": "final_norm", "unembed.hook_out": "logits"}

_WHY = {
    "attn.hook_attn_scores": "scores before the softmax are inside the model's attention function; see .pattern",
    "mlp.hook_pre": "where it stands differs by family; use the module before the activation by its own name",
    "mlp.hook_pre_linear": "where it stands differs by family; use the module by its own name",
    "hook_pos_embed": "positions are embedded by a module that few families have; use it by its own name",
    "ln_final.hook_scale": "a norm's scale is no value of its own here; compute it from resid_post",
}
_INPUTS = "blocks read one stream here: edit resid_pre or resid_mid, or patch by path"


def is_hook(name: str) -> bool:
    """Whether `name` is one of TransformerLens'."""
    return "hook_" in name


def find_hook(names: Vocabulary, name: str) -> Site:
    """The site of a hook's value.

    Raises:
        NamesError: The hook is unknown, or its value is none that is served here; the message says why.
    """
    hook = name.removeprefix("model.")
    if hook in _WHOLE:
        return find_site(names, _WHOLE[hook], None, None)
    match = _IN_BLOCK.fullmatch(hook)
    if match is not None and match[2] in _BLOCK:
        return find_site(names, _BLOCK[match[2]], int(match[1]), None)
    what = match[2] if match is not None else hook
    why = _WHY.get(what, _INPUTS if what.endswith(("_in", "_input")) else None)
    if why is not None:
        raise NamesError(f"{name} is not served: {why}.")
    known = ", ".join([*_WHOLE, *(f"blocks.0.{known}" for known in _BLOCK)])
    raise NamesError(f"There is no hook {name}. There are: {known}.")
