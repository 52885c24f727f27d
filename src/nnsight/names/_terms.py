"""Terms: every name of the vocabulary, with the axes of its values.

| name | axes | what it is |
|---|---|---|
| `resid_pre[i]` | `batch pos d_model` | the residual stream that enters layer `i` |
| `heads[i].q`, `.k`, `.v` | `batch pos head d_head` | queries, keys, values as they are projected |
| `heads[i].q_rot`, `.k_rot` | `batch pos head d_head` | queries and keys as they are scored, with the rotary embedding |
| `heads[i].pattern` | `batch head query key` | the attention probabilities |
| `heads[i].z` | `batch pos head d_head` | each head's mix of values |
| `heads[i].result` | `batch pos head d_model` | what each head adds to the attention's output |
| `attn_out[i]` | `batch pos d_model` | what attention adds to the stream |
| `mixer_out[i]` | `batch pos d_model` | what a state-space mixer adds to it |
| `resid_mid[i]` | `batch pos d_model` | the stream between the two parts of a layer |
| `cross_heads[i]`, `cross_out[i]` | as above | attention to the encoder |
| `neurons[i]` | `batch pos d_mlp` | what goes into the MLP's last projection |
| `mlp_out[i]` | `batch pos d_model` | what the MLP adds to the stream |
| `resid_post[i]` | `batch pos d_model` | the stream that leaves layer `i` |
| `logits` | `batch pos vocab` | the model's logits |
"""

from __future__ import annotations

_STREAM = ("batch", "pos", "d_model")
_HEAD = ("batch", "pos", "head", "d_head")

# What a head's value is called: its axes, in the order in which an attention computes them.
HEAD: dict[str, tuple[str, ...]] = {
    "q": _HEAD,
    "k": _HEAD,
    "v": _HEAD,
    "q_rot": _HEAD,
    "k_rot": _HEAD,
    "pattern": ("batch", "head", "query", "key"),
    "z": _HEAD,
    "result": ("batch", "pos", "head", "d_model"),
}

# The values of a layer, in the order in which it computes them.
LAYER: dict[str, tuple[str, ...]] = {
    "resid_pre": _STREAM,
    **{f"head_{name}": axes for name, axes in HEAD.items()},
    "attn_out": _STREAM,
    "mixer_out": _STREAM,
    "resid_mid": _STREAM,
    **{f"cross_head_{name}": axes for name, axes in HEAD.items()},
    "cross_out": _STREAM,
    "neurons": ("batch", "pos", "d_mlp"),
    "mlp_out": _STREAM,
    "resid_post": _STREAM,
}

# The values that the model has once, and those before its layers.
BEFORE: dict[str, tuple[str, ...]] = {"embed": _STREAM}
BEHIND: dict[str, tuple[str, ...]] = {"final_norm": _STREAM, "logits": ("batch", "pos", "vocab")}
AXES = {**BEFORE, **LAYER, **BEHIND}

VALUES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mixer_out", "cross_out", "mlp_out", "neurons")
HEADS = {"heads": "head", "cross_heads": "cross_head"}
MODULES = ("layers", "embed", "unembed", "final_norm")
IN_LAYERS = ("attn", "cross_attn", "mixer", "mlp")
IN_MLP = ("router", "experts")
