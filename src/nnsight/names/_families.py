"""Families: the table of rows, by model type; here those of decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import NamesError
from ._encoders import ENCODERS
from ._family import Attention, Family

Rows = Family | Mapping[str, Family] | Callable[[Any], Family | Mapping[str, Family]]

_SEPARATE = Attention(
    module="self_attn",
    out="self_attn.o_proj",
    q="self_attn.q_proj.output",
    k="self_attn.k_proj.output",
    v="self_attn.v_proj.output",
)
_ROTATED = replace(_SEPARATE, q_rot="@apply_rotary_pos_emb_0.output[0]", k_rot="@apply_rotary_pos_emb_0.output[1]")


def _fused(module: str, projection: str, out: str, **options: Any) -> Attention:
    spot = f"{module}.{projection}.output"
    return Attention(module=module, out=f"{module}.{out}", q=spot, k=spot, v=spot, **options)


_GPT2_HEADS = _fused("attn", "c_attn", "c_proj", split="blocks")
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
    heads=_GPT2_HEADS,
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
    heads=_ROTATED,
)
_NORMED = replace(LLAMA, heads=replace(_ROTATED, normed=True))
_SANDWICH = replace(
    LLAMA,
    resid_mid="pre_feedforward_layernorm.input",
    attn_out="post_attention_layernorm.output",
    mlp_out="post_feedforward_layernorm.output",
    head="capped",
    head_value="final_logit_softcapping",
)
_MIXTURE = replace(LLAMA, router="gate", experts="experts")
_EXPERTS_ONLY = {"neurons": "its MLPs are mixtures, whose experts have neurons of their own"}


def gpt2(config: Any) -> Family:
    if config.reorder_and_upcast_attn and config._attn_implementation == "eager":
        return replace(GPT2, heads=replace(_GPT2_HEADS, pattern="attn.attn_dropout.input", call=None))
    return GPT2


def gpt_neox(config: Any) -> Family:
    row = Family(
        layers="layers",
        embed="embed_in",
        final_norm="final_layer_norm",
        unembed="lm_head",
        attn="attention",
        mlp="mlp",
        resid_mid="post_attention_layernorm.input",
        attn_out="post_attention_dropout.output",
        mlp_out="post_mlp_dropout.output",
        neurons="mlp.dense_4h_to_h.input",
        heads=_fused(
            *("attention", "query_key_value", "dense"),
            split="interleaved",
            q_rot="@apply_rotary_pos_emb_0.output[0]",
            k_rot="@apply_rotary_pos_emb_0.output[1]",
        ),
    )
    return _parallel(row) if config.use_parallel_residual else row


def _parallel(row: Family) -> Family:
    why = "attention and MLP read the same stream side by side, so there is none between them"
    return replace(row, stream="parallel", resid_mid=None, refused={**row.refused, "resid_mid": why})


GPTJ = _parallel(
    replace(
        GPT2,
        entry=("wte",),
        neurons="mlp.fc_out.input",
        heads=Attention(
            module="attn",
            out="attn.out_proj",
            q="attn.q_proj.output",
            k="attn.k_proj.output",
            v="attn.v_proj.output",
            q_rot="@self__attn_0.input[0]",
            k_rot="@self__attn_0.input[1]",
            pattern="attn.attn_dropout.input",
            call="self__attn_0",
            call_items=(0, 1, 2),
        ),
    )
)


def opt(config: Any) -> Family:
    before = config.do_layer_norm_before
    flat = ("mlp_out", "neurons")
    row = Family(
        layers="decoder.layers",
        embed="decoder.embed_tokens",
        entry=("decoder.embed_tokens", "decoder.embed_positions"),
        final_norm="decoder.final_layer_norm",
        unembed="lm_head",
        attn="self_attn",
        resid_mid="final_layer_norm.input",
        attn_out="self_attn.output",
        mlp_out="fc2.output",
        neurons="fc2.input",
        flat=("resid_mid", *flat),
        apart=("neurons",),
        heads=replace(_SEPARATE, out="self_attn.out_proj"),
    )
    if config.word_embed_proj_dim != config.hidden_size:
        row = replace(row, entry=("decoder.embed_positions", "decoder.project_in"), bridge=True)
    if before:
        return row
    norms = ("self_attn_layer_norm", "final_layer_norm")
    return replace(row, stream="post_norm", norms=norms, resid_mid=f"{norms[0]}.output", flat=flat)


BLOOM = Family(
    layers="h",
    embed="word_embeddings",
    entry=("word_embeddings_layernorm",),
    final_norm="ln_f",
    unembed="lm_head",
    attn="self_attention",
    mlp="mlp",
    resid_mid="self_attention.output",
    attn_out="self_attention.dense.output",
    mlp_out="mlp.dense_4h_to_h.output",
    neurons="mlp.dense_4h_to_h.input",
    heads=_fused(
        *("self_attention", "query_key_value", "dense"),
        split="interleaved",
        pattern="self_attention.attention_dropout.input",
        call=None,
    ),
)


def falcon(config: Any) -> Family:
    row = Family(
        layers="h",
        embed="word_embeddings",
        final_norm="ln_f",
        unembed="lm_head",
        attn="self_attention",
        mlp="mlp",
        resid_mid="post_attention_layernorm.input",
        attn_out="self_attention.output",
        mlp_out="mlp.dense_4h_to_h.output",
        neurons="mlp.dense_4h_to_h.input",
        heads=_falcon_heads(config),
    )
    if config.parallel_attn or config.new_decoder_architecture:
        return replace(_parallel(row), apart=("mlp_out",))
    return row


def _falcon_heads(config: Any) -> Attention:
    heads = _fused("self_attention", "query_key_value", "dense", split="interleaved", call=None)
    if config.new_decoder_architecture:
        heads = replace(heads, split="grouped", kv_heads="num_kv_heads")
    elif config.multi_query:
        heads = replace(heads, split="blocks", kv_heads=1)
    product = "sdpa:torch_nn_functional_scaled_dot_product_attention_"
    if config.alibi:
        return replace(heads, pattern={"sdpa": f"{product}1", "eager": "self_attention.attention_dropout.input"})
    return replace(
        heads,
        q_rot="@apply_rotary_pos_emb_0.output[0]",
        k_rot="@apply_rotary_pos_emb_0.output[1]",
        pattern={"sdpa": f"{product}0", "eager": "@F_softmax_0.output"},
    )


PHI3 = replace(
    LLAMA,
    attn_out="resid_attn_dropout.output",
    mlp_out="resid_mlp_dropout.output",
    heads=_fused(*("self_attn", "qkv_proj", "o_proj"), split="blocks", q_rot=_ROTATED.q_rot, k_rot=_ROTATED.k_rot),
)

OLMO2 = replace(_SANDWICH, resid_mid="mlp.input", head="unembedded", heads=replace(_ROTATED, normed=True))


def deepseek_v3(config: Any) -> Family:
    query = "q_proj" if config.q_lora_rank is None else "q_b_proj"
    heads = Attention(
        module="self_attn",
        out="self_attn.o_proj",
        q=f"self_attn.{query}.output",
        k="self_attn.kv_b_proj.output",
        v="self_attn.kv_b_proj.output",
        split="latent",
        q_rot="@attention_interface_0.input[1]",
        k_rot="@attention_interface_0.input[2]",
    )
    return replace(_MIXTURE, heads=heads)


GRANITE = replace(
    LLAMA,
    entry_scale="embedding_multiplier",
    multiplier="residual_multiplier",
    head="divided",
    head_value="logits_scaling",
)

MAMBA = Family(
    layers="layers",
    embed="embeddings",
    final_norm="norm_f",
    unembed="lm_head",
    mixer="mixer",
    mixer_out="mixer.output",
)

JAMBA = replace(
    LLAMA,
    final_norm="final_layernorm",
    mlp="feed_forward",
    mixer="mamba",
    router="router",
    experts="experts",
    resid_mid="pre_ff_layernorm.input",
    mlp_out="feed_forward.output",
    mixer_out="mamba.output",
    neurons="feed_forward.down_proj.input",
    heads=_SEPARATE,
)


def with_language_model(config: Any) -> Family:
    """The row of a model of images and text: that of its language model."""
    kind = config.text_config.model_type
    found = TABLE.get(kind)
    row = found(config.text_config) if callable(found) else found
    if not isinstance(row, Family):
        raise NamesError(f"The vocabulary does not know the language model of this {config.model_type}, a {kind}.")
    return replace(row, base="language_model", config="text_config")


TABLE: dict[str, Rows] = {
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gptj": GPTJ,
    "opt": opt,
    "bloom": BLOOM,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": _NORMED,
    "gemma": LLAMA,
    "gemma2": _SANDWICH,
    "gemma3_text": replace(_SANDWICH, heads=replace(_ROTATED, normed=True)),
    "phi3": PHI3,
    "falcon": falcon,
    "starcoder2": replace(LLAMA, neurons="mlp.c_proj.input"),
    "olmo2": OLMO2,
    "granite": GRANITE,
    "mixtral": replace(_MIXTURE, neurons=None, refused=_EXPERTS_ONLY),
    "qwen2_moe": _MIXTURE,
    "qwen3_moe": replace(_MIXTURE, heads=_NORMED.heads),
    "gpt_oss": replace(LLAMA, router="router", experts="experts", neurons=None, refused=_EXPERTS_ONLY),
    "deepseek_v3": deepseek_v3,
    "mamba": MAMBA,
    "mamba2": MAMBA,
    "jamba": JAMBA,
    "bamba": replace(JAMBA, router=None, experts=None, heads=_ROTATED),
    "llava": with_language_model,
    "qwen2_vl": with_language_model,
    "qwen2_vl_text": LLAMA,
    **ENCODERS,
}
