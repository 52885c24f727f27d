"""Families: the table of rows, by model type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ._family import Attention, Family

_ROTARY = {"q_rot": "@apply_rotary_pos_emb_0.output[0]", "k_rot": "@apply_rotary_pos_emb_0.output[1]"}

_SEPARATE = Attention(
    module="self_attn",
    out="self_attn.o_proj",
    q="self_attn.q_proj.output",
    k="self_attn.k_proj.output",
    v="self_attn.v_proj.output",
)

GPT2 = Family(
    layers="h",
    embed="wte",
    entry=("wte", "wpe"),
    final_norm="ln_f",
    unembed="lm_head",
    attn="attn",
    mlp="mlp",
    resid_mid="ln_2.input",
    attn_out="attn.output",
    mlp_out="mlp.output",
    neurons="mlp.c_proj.input",
    heads=Attention(
        module="attn",
        out="attn.c_proj",
        q="attn.c_attn.output",
        k="attn.c_attn.output",
        v="attn.c_attn.output",
        split="blocks",
    ),
)

LLAMA = Family(
    layers="layers",
    embed="embed_tokens",
    final_norm="norm",
    unembed="lm_head",
    attn="self_attn",
    mlp="mlp",
    resid_mid="post_attention_layernorm.input",
    attn_out="self_attn.output",
    mlp_out="mlp.output",
    neurons="mlp.down_proj.input",
    heads=replace(_SEPARATE, **_ROTARY),
)

TABLE: dict[str, Family | Mapping[str, Family] | Callable[[Any], Family | Mapping[str, Family]]] = {
    "gpt2": GPT2,
    "llama": LLAMA,
}
