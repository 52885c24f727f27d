"""Small random models of the families, built from their configs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from torch.nn import Module

VOCABULARY = 120
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_COMMON,
}


def _gpt2() -> Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=128, **_COMMON))


def _opt() -> Module:
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            **_COMMON,
        )
    )


def _bloom() -> Module:
    return tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, **_COMMON))


def _llama() -> Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA))


def _mistral() -> Module:
    return tf.MistralForCausalLM(tf.MistralConfig(sliding_window=8, head_dim=8, **_LLAMA))


def _gemma() -> Module:
    return tf.GemmaForCausalLM(tf.GemmaConfig(head_dim=8, **_LLAMA))


def _mixtral() -> Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **_LLAMA))


def _qwen_moe() -> Module:
    return tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            **_LLAMA,
        )
    )


def _t5() -> Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_heads=4,
            vocab_size=VOCABULARY,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        )
    )


def _bert() -> Module:
    return tf.BertForMaskedLM(
        tf.BertConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=128,
            pad_token_id=0,
        )
    )


BUILDERS: dict[str, Callable[[], Module]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "bloom": _bloom,
    "llama": _llama,
    "mistral": _mistral,
    "gemma": _gemma,
    "mixtral": _mixtral,
    "qwen_moe": _qwen_moe,
    "t5": _t5,
    "bert": _bert,
}


def build(family: str) -> Module:
    """The model of a family, the same each time, in eval mode."""
    torch.manual_seed(0)
    return BUILDERS[family]().eval()


def blocks(family: str, model: Module) -> str:
    """The path of the list of blocks."""
    return {
        "gpt2": "transformer.h",
        "bloom": "transformer.h",
        "opt": "model.decoder.layers",
        "t5": "encoder.block",
        "bert": "bert.encoder.layer",
    }.get(family, "model.layers")
