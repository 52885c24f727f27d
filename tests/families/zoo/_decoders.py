"""Dense decoders, each with the options that set its family apart."""

from __future__ import annotations

from typing import Any

import transformers as tf

from ._family import COMMON, Family

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **COMMON,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **COMMON}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    **COMMON,
}
NEOX = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
BLOOM = {"hidden_size": 32, "n_layer": 3, "n_head": 4, **COMMON}
FALCON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_hidden_size": 48, **COMMON}


def decoder(
    name: str,
    architecture: str,
    config: dict[str, Any],
    blocks: str = "model.layers",
    attention: str = "self_attn",
    **operations: str,
) -> Family:
    """A family whose config class and model class share a name."""
    settings = getattr(tf, f"{architecture}TextConfig", None) or getattr(tf, f"{architecture}Config")
    model = getattr(tf, f"{architecture}{'LMHeadModel' if architecture == 'GPT2' else 'ForCausalLM'}", None)
    assert model is not None
    return Family(name, lambda: model(settings(**config)), blocks, f"{blocks}.1.{attention}", operations=operations)


def partial(share: float) -> dict[str, Any]:
    return {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": share}


DECODERS = [
    decoder(
        "gpt2",
        "GPT2",
        {**GPT2, "scale_attn_by_inverse_layer_idx": True},
        *("transformer.h", "attn"),
        c_attn="self_c_attn_1",  # the first is for cross-attention
    ),
    decoder("gpt_neox", "GPTNeoX", {**NEOX, "rope_parameters": partial(0.5)}, "gpt_neox.layers", "attention"),
    decoder("gptj", "GPTJ", {**GPT2, "rotary_dim": 4}, "transformer.h", "attn"),
    decoder("opt", "OPT", OPT, "model.decoder.layers"),
    decoder("bloom", "Bloom", BLOOM, "transformer.h", "self_attention"),
    decoder("llama", "Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    decoder("mistral", "Mistral", {**LLAMA, "head_dim": 8, "sliding_window": 8}),
    decoder("qwen2", "Qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    decoder("qwen3", "Qwen3", {**LLAMA, "head_dim": 16}),
    decoder("gemma", "Gemma", {**LLAMA, "head_dim": 8}),
    decoder(
        "gemma2",
        "Gemma2",
        {
            **LLAMA,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": SLIDING,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    decoder("gemma3", "Gemma3", {**LLAMA, "head_dim": 8, "sliding_window": 8, "layer_types": SLIDING}),
    decoder("phi3", "Phi3", {**LLAMA, "sliding_window": 8, "rope_parameters": partial(0.5)}),
    decoder(
        "falcon", "Falcon", {**FALCON, "multi_query": True, "parallel_attn": True}, "transformer.h", "self_attention"
    ),
    decoder(
        "falcon_alibi",
        "Falcon",
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        "transformer.h",
        "self_attention",
        dense="self_dense_1",  # the first is for rotary positions
    ),
    decoder("starcoder2", "Starcoder2", {**LLAMA, "sliding_window": 8}),
    decoder("olmo2", "Olmo2", LLAMA),
]
