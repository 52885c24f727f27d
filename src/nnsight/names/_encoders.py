"""Encoders: the rows of encoders, of encoders with decoders, and of towers for images and sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ._family import Attention, Family

_NO_FINAL_NORM = {"final_norm": "its layers end with a norm each"}
_NO_EMBED = {"embed": "it is given no tokens"}


def _separate(module: str, out: str = "out_proj", **options: Any) -> Attention:
    q, k, v = (f"{module}.{name}_proj.output" for name in "qkv")
    return Attention(module=module, out=f"{module}.{out}", q=q, k=k, v=v, **options)


BERT = Family(
    layers="encoder.layer",
    embed="embeddings.word_embeddings",
    entry=("embeddings",),
    unembed="cls.predictions.decoder",
    bridge=True,
    attn="attention",
    resid_mid="attention.output.output",
    attn_out="attention.output.dropout.output",
    mlp_out="output.dropout.output",
    neurons="output.dense.input",
    stream="post_norm",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    heads=Attention(
        module="attention.self",
        out="attention.output.dense",
        q="attention.self.query.output",
        k="attention.self.key.output",
        v="attention.self.value.output",
    ),
    refused=_NO_FINAL_NORM,
)

MODERNBERT = Family(
    layers="layers",
    embed="embeddings.tok_embeddings",
    entry=("embeddings",),
    final_norm="final_norm",
    unembed="decoder",
    bridge=True,
    attn="attn",
    mlp="mlp",
    resid_mid="mlp_norm.input",
    attn_out="attn.output",
    mlp_out="mlp.output",
    neurons="mlp.Wo.input",
    heads=Attention(
        module="attn",
        out="attn.Wo",
        q="attn.Wqkv.output",
        k="attn.Wqkv.output",
        v="attn.Wqkv.output",
        split="blocks",
        q_rot="@apply_rotary_pos_emb_0.output[0]",
        k_rot="@apply_rotary_pos_emb_0.output[1]",
    ),
)


def t5(config: Any) -> Mapping[str, Family]:
    def heads(path: str) -> Attention:
        q, k, v = (f"{path}.{name}.output" for name in "qkv")
        return Attention(module=path, out=f"{path}.o", q=q, k=k, v=v, heads="num_heads")

    def stack(base: str, mlp: str) -> Family:
        return Family(
            base=base,
            layers="block",
            embed="embed_tokens",
            final_norm="final_layer_norm",
            attn="layer.0.SelfAttention",
            mlp=f"{mlp}.DenseReluDense",
            resid_mid="layer.0.output",
            attn_out="layer.0.dropout.output",
            mlp_out=f"{mlp}.dropout.output",
            neurons=f"{mlp}.DenseReluDense.wo.input",
            apart=("neurons",),
            heads=heads("layer.0.SelfAttention"),
        )

    decoder = replace(
        stack("decoder", "layer.2"),
        unembed="lm_head",
        bridge=bool(getattr(config, "scale_decoder_outputs", False)),
        cross_attn="layer.1.EncDecAttention",
        cross_out="layer.1.dropout.output",
        cross_heads=heads("layer.1.EncDecAttention"),
    )
    return {"encoder": stack("encoder", "layer.1"), "decoder": decoder}


def _seq2seq(base: str, **options: Any) -> Family:
    return Family(
        base=base,
        layers="layers",
        embed="embed_tokens",
        attn="self_attn",
        attn_out="self_attn.output",
        mlp_out="fc2.output",
        neurons="fc2.input",
        heads=_separate("self_attn", heads=f"{base}_attention_heads"),
        **options,
    )


_CROSS = {
    "cross_attn": "encoder_attn",
    "cross_out": "encoder_attn.output",
    "cross_heads": _separate("encoder_attn", heads="decoder_attention_heads"),
}
_POST = {
    "entry": ("layernorm_embedding",),
    "stream": "post_norm",
    "resid_mid": "self_attn_layer_norm.output",
    "refused": _NO_FINAL_NORM,
}
_NORMS = ("self_attn_layer_norm", "final_layer_norm")

BART = {
    "encoder": _seq2seq("encoder", norms=_NORMS, **_POST),
    "decoder": _seq2seq(
        "decoder",
        norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        unembed="lm_head",
        head="biased",
        head_value="final_logits_bias",
        **_POST,
        **_CROSS,
    ),
}

WHISPER = {
    "encoder": _seq2seq(
        "encoder", entry=(), final_norm="layer_norm", resid_mid="final_layer_norm.input", refused=_NO_EMBED
    ),
    "decoder": _seq2seq(
        "decoder",
        entry=("embed_tokens", "embed_positions"),
        final_norm="layer_norm",
        unembed="proj_out",
        resid_mid="encoder_attn_layer_norm.input",
        **_CROSS,
    ),
}

_TOWER = Family(
    layers="encoder.layers",
    entry=("embeddings",),
    attn="self_attn",
    mlp="mlp",
    resid_mid="layer_norm2.input",
    attn_out="self_attn.output",
    mlp_out="mlp.output",
    neurons="mlp.fc2.input",
    heads=_separate("self_attn"),
)
CLIP_TEXT = replace(_TOWER, embed="embeddings.token_embedding", final_norm="final_layer_norm")
CLIP_VISION = replace(
    _TOWER,
    entry=("pre_layrnorm",),
    refused={**_NO_EMBED, "final_norm": "its last norm is given the first position alone: use model.post_layernorm"},
)
CLIP = {
    "vision": replace(CLIP_VISION, base="vision_model", config="vision_config"),
    "text": replace(CLIP_TEXT, base="text_model", config="text_config"),
}

VIT = replace(
    _TOWER,
    layers="layers",
    final_norm="layernorm",
    attn="attention",
    resid_mid="layernorm_after.input",
    attn_out="attention.output",
    mlp_out="mlp.output",
    heads=_separate("attention", "o_proj"),
    refused=_NO_EMBED,
)

ENCODERS: dict[str, Family | Mapping[str, Family] | Callable[[Any], Family | Mapping[str, Family]]] = {
    "bert": BERT,
    "roberta": replace(BERT, unembed="lm_head.decoder"),
    "modernbert": MODERNBERT,
    "t5": t5,
    "bart": BART,
    "whisper": WHISPER,
    "clip": CLIP,
    "clip_text_model": CLIP_TEXT,
    "clip_vision_model": CLIP_VISION,
    "vit": VIT,
}
