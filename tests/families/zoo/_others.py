"""Encoders, encoder-decoders, and models of images and sound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers as tf

from ._decoders import LLAMA
from ._family import COMMON, VOCABULARY, Family, Inputs

NO_GENERATION = {"generate": "an encoder: it does not generate"}
BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **COMMON,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 1,
    **COMMON,
}
IMAGE_TOKEN = VOCABULARY - 1


def encoder(name: str, model: type, config: Any, blocks: str, attention: str, head: str) -> Family:
    return Family(
        name, lambda: model(config), blocks, f"{blocks}.1.{attention}", head=head, kind="encoder", reasons=NO_GENERATION
    )


def t5() -> torch.nn.Module:
    config = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(
        tf.T5Config(**config, decoder_start_token_id=0, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=2)
    )


TEXT = [
    Family(
        *("t5", t5, "encoder.block", "encoder.block.1.layer.0.SelfAttention"),
        kind="encoder-decoder",
        decoder="decoder.block",
    ),
    Family(
        "bart",
        lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(**SEQ2SEQ, max_position_embeddings=128, forced_eos_token_id=None)
        ),
        *("model.encoder.layers", "model.encoder.layers.1.self_attn"),
        kind="encoder-decoder",
        decoder="model.decoder.layers",
    ),
    encoder(
        *("bert", tf.BertForMaskedLM, tf.BertConfig(**BERT)),
        *("bert.encoder.layer", "attention.self", "cls.predictions.decoder"),
    ),
    encoder(
        *("roberta", tf.RobertaForMaskedLM, tf.RobertaConfig(**BERT)),
        *("roberta.encoder.layer", "attention.self", "lm_head.decoder"),
    ),
    encoder(
        "modernbert",
        tf.ModernBertForMaskedLM,
        tf.ModernBertConfig(
            **BERT,
            cls_token_id=1,
            sep_token_id=2,
            norm_bias=True,
            attention_bias=True,
            mlp_bias=True,
            local_attention=8,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        *("model.layers", "attn", "decoder"),
    ),
]


def pixels(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, 16, 16)


def words(rows: int, length: int = 7) -> torch.Tensor:
    return torch.randint(3, IMAGE_TOKEN - 1, (rows, length))


def some() -> int:
    """A number of tokens that differs from input to input."""
    return int(torch.randint(3, 12, ()))


def clip() -> torch.nn.Module:
    text = {**{n: v for n, v in BERT.items() if n != "max_position_embeddings"}, "max_position_embeddings": 16}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=dict(VISION), projection_dim=16))


def clip_inputs(rows: int) -> Inputs:
    ids = words(rows)
    ids[:, -1] = 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(rows)}


def whisper() -> torch.nn.Module:
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            **SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=64,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


def whisper_inputs(rows: int) -> Inputs:
    return {"input_features": torch.randn(rows, 8, 32), "decoder_input_ids": words(rows, 5)}


def llava() -> torch.nn.Module:
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **VISION},
            text_config={"model_type": "llama", **LLAMA},
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-2,
        )
    )


def llava_inputs(rows: int) -> Inputs:
    ids = torch.cat([words(rows, 2), torch.full((rows, 16), IMAGE_TOKEN), words(rows, some())], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(rows)}


def qwen2_vl() -> torch.nn.Module:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            text_config={**LLAMA, "rope_parameters": rope},
            vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
            image_token_id=IMAGE_TOKEN,
            video_token_id=IMAGE_TOKEN - 1,
            vision_start_token_id=3,
            vision_end_token_id=4,
        )
    )


def qwen2_vl_inputs(rows: int) -> Inputs:
    ids = torch.cat([words(rows, 2), torch.full((rows, 4), IMAGE_TOKEN), words(rows, some())], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(rows * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
    }


def tensors(name: str, make: Any, example: Any, blocks: str, attention: str, head: str, **reasons: str) -> Family:
    family = Family(name, make, blocks, f"{blocks}.1.{attention}", head=head, kind="tensors", example=example)
    return replace(family, reasons=reasons)


MULTIMODAL = [
    tensors(
        "vit",
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=10)),
        lambda rows: {"pixel_values": pixels(rows)},
        *("vit.layers", "attention", "classifier"),
        generate="a classifier of images: it does not generate",
    ),
    tensors(
        *("clip", clip, clip_inputs),
        *("vision_model.encoder.layers", "self_attn", "visual_projection"),
        generate="a pair of encoders: it does not generate",
    ),
    replace(
        tensors("whisper", whisper, whisper_inputs, "model.encoder.layers", "self_attn", "proj_out"),
        decoder="model.decoder.layers",
    ),
    replace(
        tensors("llava", llava, llava_inputs, "model.language_model.layers", "self_attn", "lm_head"),
        kind="vision-language",
    ),
    replace(
        tensors("qwen2_vl", qwen2_vl, qwen2_vl_inputs, "model.language_model.layers", "self_attn", "lm_head"),
        kind="vision-language",
        # Where each image begins among all patches, and tables that images of one size have alike.
        refuses=("model.visual.blocks.*.input", "model.visual.rotary_pos_emb.*"),
    ),
]
