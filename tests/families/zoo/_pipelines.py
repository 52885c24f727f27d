"""Pipelines of diffusers: several models and a loop around them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from ._family import COMMON, VOCABULARY, Family, enliven

STEPS = 3
_BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def stable_diffusion() -> Any:
    """A Stable Diffusion with random weights, of images of 16 x 16, whose words are the numbers below the vocabulary."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        **_BLOCKS,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(
        **_BLOCKS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = tf.CLIPTextModel(tf.CLIPTextConfig(**sizes, max_position_embeddings=16, **COMMON))
    for module in (unet, vae, text):
        enliven(module.eval())
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=_tokenizer(),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    backend = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="3"))
    backend.pre_tokenizer = Whitespace()
    names = {"pad_token": "0", "bos_token": "1", "eos_token": "2", "unk_token": "3"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, **names)


PIPELINES = {
    "stable_diffusion": Family(
        "stable_diffusion",
        stable_diffusion,
        blocks="unet.mid_block.resnets",
        attention="unet.mid_block.attentions.0.transformer_blocks.0.attn2",
        head="unet.conv_out",
        kind="pipeline",
        reasons={
            "vocabulary": "a U-Net: its stream has channels and changes its size, and the names are of transformers'"
        },
    )
}
