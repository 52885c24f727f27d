"""Models of every family, and where plain hooks find their values: written down apart from the vocabulary's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as tf
import zoo
from torch.nn import Module
from zoo import plain
from zoo._decoders import FALCON, LLAMA, NEOX, OPT, decoder

from nnsight import NNsight

LAYERS = range(3)

T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 120}
MORE = [
    decoder(
        "granite", "Granite", {**LLAMA, "residual_multiplier": 0.3, "embedding_multiplier": 5.0, "logits_scaling": 4.0}
    ),
    decoder("gpt_neox_serial", "GPTNeoX", {**NEOX, "use_parallel_residual": False}, "gpt_neox.layers", "attention"),
    decoder(
        "falcon_grouped",
        "Falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        *("transformer.h", "self_attention"),
    ),
    decoder(
        "opt_post", "OPT", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}, "model.decoder.layers"
    ),
    replace(
        zoo.FAMILIES["t5"],
        name="t5_gated",
        make=lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
        ),
    ),
]
FAMILIES = {**zoo.FAMILIES, **{family.name: family for family in MORE}}

Place = tuple[str, str]  # a module's path below the layer, "in" or "out"


@dataclass(frozen=True)
class Case:
    """One stack of layers of a family.

    Args:
        family: Its name in `FAMILIES`.
        stack: Its name in the vocabulary.
        blocks: The path of the layers.
        mid: Where the stream between attention and MLP is found; `attn`, `mlp`, `neurons`, `cross` likewise.
        out: The projection behind the heads, of those layers that have one.
        query: The projection to queries, keys and values, and how they stand in its output.
    """

    family: str
    stack: str = ""
    blocks: str = "model.layers"
    mid: Place | None = ("post_attention_layernorm", "in")
    attn: Place | None = ("self_attn", "out")
    mlp: Place | None = ("mlp", "out")
    neurons: Place | None = ("mlp.down_proj", "in")
    cross: Place | None = None
    mixer: Place | None = None
    out: str | None = "self_attn.o_proj"
    multiplier: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.family}-{self.stack}" if self.stack else self.family


GPT2 = {"blocks": "transformer.h", "mid": ("ln_2", "in"), "attn": ("attn", "out"), "neurons": ("mlp.c_proj", "in")}
SEQ2SEQ = {"neurons": ("fc2", "in"), "mlp": ("fc2", "out"), "out": "self_attn.out_proj"}
MOE = {"neurons": None}
SANDWICH = {
    "mid": ("pre_feedforward_layernorm", "in"),
    "attn": ("post_attention_layernorm", "out"),
    "mlp": ("post_feedforward_layernorm", "out"),
}
BERT = {
    "mid": ("attention.output", "out"),
    "attn": ("attention.output.dense", "out"),
    "mlp": ("output.dense", "out"),
    "neurons": ("output.dense", "in"),
    "out": "attention.output.dense",
}
FALCON_PLACES = {
    "blocks": "transformer.h",
    "mid": None,
    "attn": ("self_attention", "out"),
    "mlp": ("mlp.dense_4h_to_h", "out"),
    "neurons": ("mlp.dense_4h_to_h", "in"),
    "out": "self_attention.dense",
}
NEOX_PLACES = {**FALCON_PLACES, "blocks": "gpt_neox.layers", "attn": ("attention", "out"), "out": "attention.dense"}
TOWER = {"mid": ("layer_norm2", "in"), "neurons": ("mlp.fc2", "in"), "out": "self_attn.out_proj"}
HYBRID = {
    "mid": ("pre_ff_layernorm", "in"),
    "mlp": ("feed_forward", "out"),
    "mixer": ("mamba", "out"),
    "neurons": ("feed_forward.down_proj", "in"),
}
MAMBA = {
    "blocks": "backbone.layers",
    "mid": None,
    "attn": None,
    "mlp": None,
    "neurons": None,
    "mixer": ("mixer", "out"),
    "out": None,
}


def _t5(stack: str, mlp: str) -> dict[str, Any]:
    return {
        "stack": stack,
        "blocks": f"{stack}.block",
        "mid": ("layer.0", "out"),
        "attn": ("layer.0.SelfAttention", "out"),
        "mlp": (f"{mlp}.DenseReluDense", "out"),
        "neurons": (f"{mlp}.DenseReluDense.wo", "in"),
        "cross": ("layer.1.EncDecAttention", "out") if stack == "decoder" else None,
        "out": "layer.0.SelfAttention.o",
    }


def _half(stack: str, mid: Place) -> dict[str, Any]:
    cross = ("encoder_attn", "out") if stack == "decoder" else None
    return {**SEQ2SEQ, "stack": stack, "blocks": f"model.{stack}.layers", "mid": mid, "cross": cross}


CASES = [
    Case("gpt2", **GPT2, out="attn.c_proj"),
    Case("gpt_neox", **NEOX_PLACES),
    Case("gpt_neox_serial", **{**NEOX_PLACES, "mid": ("post_attention_layernorm", "in")}),
    Case("gptj", **{**GPT2, "mid": None, "neurons": ("mlp.fc_out", "in")}, out="attn.out_proj"),
    Case("opt", **SEQ2SEQ, blocks="model.decoder.layers", mid=("final_layer_norm", "in")),
    Case("opt_post", **SEQ2SEQ, blocks="model.decoder.layers", mid=("self_attn_layer_norm", "out")),
    Case(
        "bloom",
        **{
            **FALCON_PLACES,
            "mid": ("self_attention", "out"),
            "attn": ("self_attention.dense", "out"),
        },
    ),
    *(Case(name) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")),
    *(Case(name, **SANDWICH) for name in ("gemma2", "gemma3")),
    Case("olmo2", **{**SANDWICH, "mid": ("mlp", "in")}),
    Case("granite", multiplier=0.3),
    Case("starcoder2", neurons=("mlp.c_proj", "in")),
    Case("falcon", **FALCON_PLACES),
    Case("falcon_grouped", **FALCON_PLACES),
    Case("falcon_alibi", **{**FALCON_PLACES, "mid": ("post_attention_layernorm", "in")}),
    *(Case(name, **MOE) for name in ("mixtral", "qwen3_moe", "gpt_oss")),
    *(Case(name) for name in ("qwen2_moe", "deepseek_v3")),
    *(Case(name, **MAMBA) for name in ("mamba", "mamba2")),
    *(Case(name, **HYBRID) for name in ("jamba", "bamba")),
    *(Case(name, **_t5("encoder", "layer.1")) for name in ("t5", "t5_gated")),
    *(Case(name, **_t5("decoder", "layer.2")) for name in ("t5", "t5_gated")),
    *(Case("bart", **_half(stack, ("self_attn_layer_norm", "out"))) for stack in ("encoder", "decoder")),
    Case("whisper", **_half("encoder", ("final_layer_norm", "in"))),
    Case("whisper", **_half("decoder", ("encoder_attn_layer_norm", "in"))),
    *(Case(name, blocks=f"{name}.encoder.layer", **BERT) for name in ("bert", "roberta")),
    Case("modernbert", mid=("mlp_norm", "in"), attn=("attn", "out"), neurons=("mlp.Wo", "in"), out="attn.Wo"),
    Case(
        "vit",
        blocks="vit.layers",
        mid=("layernorm_after", "in"),
        attn=("attention", "out"),
        neurons=("mlp.fc2", "in"),
        out="attention.o_proj",
    ),
    *(Case("clip", stack, f"{stack}_model.encoder.layers", **TOWER) for stack in ("vision", "text")),
    *(Case(name, blocks="model.language_model.layers") for name in ("llava", "qwen2_vl")),
]
BY_NAME = {case.name: case for case in CASES}
WITH_HEADS = [case for case in CASES if case.out is not None]


def build(case: Case, **options: Any) -> Module:
    """The model; `attn_implementation` may be set."""
    net = zoo.build(FAMILIES[case.family])
    if options:
        net.set_attn_implementation(options["attn_implementation"])
    return net


def wrap(case: Case, net: Module | None = None) -> tuple[NNsight, Any, Module]:
    """The wrapped model, the names of its stack, and the module itself."""
    net = build(case) if net is None else net
    model = NNsight(net)
    return model, model.names.stacks[case.stack], net


def inputs(case: Case, rows: int = 2, seed: int = 0) -> zoo._family.Inputs:  # pyright: ignore
    return zoo.inputs(FAMILIES[case.family], rows=rows, seed=seed)


def blocks(case: Case, net: Module) -> Any:
    return net.get_submodule(case.blocks)


def at(case: Case, net: Module, layer: int, place: Place | None) -> Module | None:
    """The module of a place in a layer, None where that layer has none."""
    if place is None:
        return None
    try:
        return blocks(case, net)[layer].get_submodule(place[0])
    except AttributeError:
        return None


def hook(module: Module, kind: str, edit: Callable[[Any], Any]) -> Any:
    return plain.on_input(module, edit) if kind == "in" else plain.on_output(module, edit)


def seen(case: Case, net: Module, layer: int, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What plain hooks see at the places of one layer: copies."""
    found: dict[str, torch.Tensor] = {}
    places = {
        "resid_pre": ("", "in"),
        "resid_mid": case.mid,
        "resid_post": ("", "out"),
        "attn_out": case.attn,
        "mlp_out": case.mlp,
        "mixer_out": case.mixer,
        "cross_out": case.cross,
        "neurons": case.neurons,
    }
    if case.out is not None:
        places |= {"z": (case.out, "in"), "projected": (case.out, "out")}
    handles = []
    for name, place in places.items():
        module = at(case, net, layer, place)
        if module is not None:
            handles.append(hook(module, place[1], lambda value, name=name: found.update({name: value.clone()})))
    with plain.hooks(*handles):
        found["output"] = first(net(**given))
    return found


def first(output: Any) -> torch.Tensor:
    """The tensor that stands for a model's result."""
    for name in ("logits", "logits_per_image"):
        if getattr(output, name, None) is not None:
            return output[name].detach().clone()
    return output[0].detach().clone()


def shaped(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A hook's tensor with batch and positions apart, as `like` has them."""
    return value.reshape(*like.shape[:2], -1)


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-6))
