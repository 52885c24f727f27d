"""Small random models and processors, built from their configs without any file."""

from __future__ import annotations

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.nn import Module
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

WORDS = "<pad> <s> </s> <unk> <image> <start> <end> <video> a red green blue cat dog tower is in the of what this and".split()
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}
IMAGE = WORDS.index("<image>")
TEXT = {**SIZES, "vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Words apart by blanks, and the placeholders of images."""
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Split(" ", "removed")
    found = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<start>", "<end>", "<video>"],
    )
    found.image_token, found.video_token = "<image>", "<video>"
    found.image_token_id, found.video_token_id = IMAGE, WORDS.index("<video>")
    return found


def image(seed: int, width: int = 20, height: int = 24) -> Image.Image:
    numbers = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def sound(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(length).astype("float32")


def lively(model: Module) -> Module:
    """In eval mode, with weights that let inputs make a difference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 / max(parameter.shape[-1] / 32, 1) ** 0.5)
    return model.eval()


def bert(kind: type = tf.BertForSequenceClassification, **more: int) -> Module:
    return lively(kind(tf.BertConfig(**TEXT, num_labels=3, max_position_embeddings=64, **more)))


def vit() -> tuple[Module, object]:
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    return lively(tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=5))), processor


def clip() -> tuple[Module, object]:
    config = tf.CLIPConfig(text_config={**TEXT, "max_position_embeddings": 32}, vision_config=VISION, projection_dim=16)
    crop = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return lively(tf.CLIPModel(config)), tf.CLIPProcessor(CLIPImageProcessorPil(**crop), tokenizer())


def whisper() -> tuple[Module, object]:
    config = tf.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=40,
        vocab_size=60,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        max_length=40,
    )
    return lively(tf.WhisperForConditionalGeneration(config)), tf.WhisperFeatureExtractor(
        feature_size=8, chunk_length=1
    )


def wav2vec2(norm: str) -> tuple[Module, object]:
    config = tf.Wav2Vec2Config(
        **{**SIZES, "vocab_size": 30, "pad_token_id": 0},
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
    )
    return lively(tf.Wav2Vec2ForCTC(config)), tf.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer")


def llava() -> tuple[Module, object]:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT, num_key_value_heads=2),
        image_token_id=IMAGE,
    )
    crop = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = tf.LlavaProcessor(
        CLIPImageProcessorPil(**crop),
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return lively(tf.LlavaForConditionalGeneration(config)), processor


class ImagesOnly(tf.Qwen2VLProcessor):
    """Qwen2-VL's processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: object, tokenizer: tf.PreTrainedTokenizerFast, chat_template: str) -> None:
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id, self.video_token_id = IMAGE, WORDS.index("<video>")
        tf.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen2_vl() -> tuple[Module, object]:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = tf.Qwen2VLConfig(
        text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=IMAGE,
        video_token_id=WORDS.index("<video>"),
        vision_start_token_id=WORDS.index("<start>"),
        vision_end_token_id=WORDS.index("<end>"),
    )
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    processor = ImagesOnly(images, tokenizer(), CHAT)
    return lively(tf.Qwen2VLForConditionalGeneration(config)), processor


CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)
