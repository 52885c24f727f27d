"""Mixtures of experts, state-space models and hybrids of both."""

from __future__ import annotations

from dataclasses import replace

from ._decoders import LLAMA, SLIDING, decoder
from ._family import COMMON, Family

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def mixture(family: Family, *routers: str, calls_activation: bool = True) -> Family:
    """`family` with the paths of routers and experts, given in relation to its second block.

    Tokens of all rows, sorted by expert, are seen where the experts call a module on them.
    """
    return replace(
        family,
        routers=tuple(f"{family.blocks}.1.{path}" for path in routers),
        refuses=("*.experts.act_fn.*",) if calls_activation else (),
    )


MIXTURES = [
    mixture(
        decoder("mixtral", "Mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
        *("mlp.gate", "mlp.experts"),
    ),
    mixture(
        decoder(
            "qwen2_moe",
            "Qwen2Moe",
            {**LLAMA, **EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
        ),
        *("mlp.gate", "mlp.experts", "mlp.shared_expert", "mlp.shared_expert_gate"),
    ),
    mixture(
        decoder("qwen3_moe", "Qwen3Moe", {**LLAMA, **EXPERTS, "norm_topk_prob": True}),
        *("mlp.gate", "mlp.experts"),
    ),
    mixture(
        decoder(
            "gpt_oss",
            "GptOss",
            {
                **LLAMA,
                "head_dim": 8,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 8,
                "layer_types": SLIDING,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 150000.0,
                    "factor": 4.0,
                    "truncate": False,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "original_max_position_embeddings": 32,
                },
            },
        ),
        *("mlp.router", "mlp.experts"),
        calls_activation=False,
    ),
    mixture(
        decoder(
            "deepseek_v3",
            "DeepseekV3",
            {
                **LLAMA,
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 8,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 4,
                "v_head_dim": 8,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "n_group": 4,
                "topk_group": 2,
                "n_shared_experts": 1,
                "moe_intermediate_size": 24,
                "first_k_dense_replace": 1,
            },
        ),
        *("mlp.gate", "mlp.experts", "mlp.shared_experts"),
    ),
]

STATE_SPACE = [
    decoder(
        "mamba",
        "Mamba",
        {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "time_step_rank": 2, **COMMON},
        *("backbone.layers", "mixer"),
    ),
    decoder(
        "mamba2",
        "Mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "state_size": 8,
            "chunk_size": 8,
            **COMMON,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 2,
        },
        *("backbone.layers", "mixer"),
    ),
    mixture(
        decoder(
            "jamba",
            "Jamba",
            {
                **LLAMA,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "mamba_d_state": 4,
                "mamba_dt_rank": 2,
            },
        ),
        *("feed_forward.router", "feed_forward.experts"),
    ),
    decoder(
        "bamba",
        "Bamba",
        {
            **LLAMA,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 8,
        },
    ),
]
