"""Family: what the vocabulary needs to know of one architecture, as a row of data.

Paths of modules are relative: those of a stack to the base model (`GPT2LMHeadModel.transformer`), those of a layer to
the layer.  A *spot* says where a value is found: `"mlp.output"`, `"ln_2.input"`, the first item where that is a tuple;
`"@apply_rotary_pos_emb_0.output[1]"` is an operation in the forward of the layer's attention, with the item.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..errors import InputError

Split = Literal["separate", "blocks", "interleaved", "grouped", "latent"]
Sum = Literal["sequential", "parallel", "post_norm"]
Head = Literal["unembedded", "capped", "divided", "multiplied", "biased"]

_SPOT = re.compile(r"(?P<at>@?)(?P<path>[\w.]*?)\.?(?P<kind>input|output)(?:\[(?P<item>\d+)\])?")


class Spot(NamedTuple):
    """Where a value is found: at the input or output of a module, or of an operation of the layer's attention."""

    path: str
    kind: str
    item: int
    is_operation: bool

    @classmethod
    def parse(cls, text: str) -> Spot:
        """The spot that a row writes as `text`."""
        match = _SPOT.fullmatch(text)
        if match is None:
            raise InputError(f"{text!r} is no spot: write a module's path and .input or .output, as in 'mlp.output'.")
        return cls(match["path"], match["kind"], int(match["item"] or 0), bool(match["at"]))


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The heads of one attention of a layer.

    Args:
        module: The module whose forward calls the attention function.
        out: The projection that the heads' mixed values go through.
        q: The spot of the queries as they are projected, `[batch, pos, head * d_head]`; so for `k` and `v`.
        k: As `q`.
        v: As `q`.
        split: How `q`, `k` and `v` stand in those tensors: `separate` tensors; `blocks` of all queries, all keys, all
            values; `interleaved` by head; `grouped` by head of keys and values; `latent` as in DeepSeek's attention.
        q_rot: The spot of the queries as they are scored with the keys, where a rotary embedding stands in between.
        k_rot: As `q_rot`.
        normed: Whether queries and keys pass a norm before they are scored.
        pattern: The spot of the probabilities, by attention implementation where it depends on that; `"interface"`
            where the forward calls `attention_interface`.
        call: The operation that is called with queries, keys and values.
        call_items: The positions of these three among its arguments.
        heads: The name of the config's number of heads, or the number.
        kv_heads: The same for heads of keys and values; by default as many.
    """

    module: str
    out: str
    q: str
    k: str
    v: str
    split: Split = "separate"
    q_rot: str | None = None
    k_rot: str | None = None
    normed: bool = False
    pattern: str | Mapping[str, str] = "interface"
    call: str | None = "attention_interface_0"
    call_items: tuple[int, int, int] = (1, 2, 3)
    heads: str | int = "num_attention_heads"
    kv_heads: str | int = "num_key_value_heads"

    def pattern_in(self, implementation: str) -> str | None:
        """The spot of the probabilities under an attention implementation, None where there is none."""
        return self.pattern if isinstance(self.pattern, str) else self.pattern.get(implementation)

    def operations(self) -> frozenset[str]:
        """The operations of the forward at which values are found."""
        texts = [self.q, self.k, self.v, self.q_rot, self.k_rot]
        texts += [self.pattern] if isinstance(self.pattern, str) else self.pattern.values()
        found = {Spot.parse(text).path for text in texts if text and text.startswith("@")}
        found |= {text.removeprefix("sdpa:") for text in texts if text and text.startswith("sdpa:")}
        return frozenset(found | {"attention_interface_0"} if "interface" in texts else found)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One stack of layers: where each name of the vocabulary is found, and how its residual stream adds up.

    Example:
        >>> from nnsight.names import Attention, Family
        >>> row = Family(
        ...     layers="blocks", embed="wte", final_norm="norm", unembed="head",
        ...     attn="mix", mlp="ff", resid_mid="norm_2.input", attn_out="mix.output", mlp_out="ff.output",
        ...     neurons="ff.down.input",
        ...     heads=Attention(module="mix", out="mix.o", q="mix.q.output", k="mix.k.output", v="mix.v.output"),
        ... )
        >>> row.stream
        'sequential'

    Args:
        layers: The list of blocks, from the base model.
        embed: The embedding of tokens, from the base model.
        entry: Modules whose outputs add up to what enters the first layer, from the base model; by default `embed`.
        final_norm: The norm behind the last layer, from the base model.
        unembed: The projection to the vocabulary, from the root.
        entry_scale: The config's factor of that sum.
        head: How logits follow from the output of `unembed`: as they are, capped by, divided by or multiplied with the
            config's `head_value`, or with the model's buffer of that name added.
        bridge: Whether something else stands between `final_norm` and `unembed`.
        base: Where the stack is, from the base model.
        attn: The attention of a layer; `mlp`, `mixer` (of a state-space model), `cross_attn`, and, inside `mlp`, `router`
            and `experts` likewise.
        resid_pre: The spot of what enters a layer; the other names of values likewise.
        stream: How they add up. `sequential`: `resid_mid = resid_pre + attn_out`, `resid_post = resid_mid + mlp_out`;
            `parallel`: `resid_post = resid_pre + attn_out + mlp_out`; `post_norm`: as `sequential`, with a norm over
            each sum. With `cross_out`, that is added between the two; `mixer_out` stands for `attn_out`.
        multiplier: The config's factor of `attn_out` and `mlp_out` in these sums.
        norms: With `post_norm`, the norms over the sums, in order.
        flat: Names whose tensors have batch and positions in one dimension.
        apart: Names whose tensors the model writes over later, or needs as they are for a gradient (ReLU's result).
        heads: The heads of the attention, and of the attention to an encoder.
        config: The name of the part of the config that describes this stack.
        refused: Names that this family cannot serve, and why.
    """

    layers: str
    embed: str | None = None
    entry: tuple[str, ...] | None = None
    entry_scale: str | None = None
    final_norm: str | None = None
    unembed: str | None = None
    head: Head = "unembedded"
    head_value: str = ""
    bridge: bool = False
    base: str | None = None
    config: str | None = None
    attn: str | None = None
    cross_attn: str | None = None
    mlp: str | None = None
    mixer: str | None = None
    router: str | None = None
    experts: str | None = None
    resid_pre: str | None = "input"
    resid_mid: str | None = None
    resid_post: str | None = "output"
    attn_out: str | None = None
    cross_out: str | None = None
    mlp_out: str | None = None
    mixer_out: str | None = None
    neurons: str | None = None
    stream: Sum = "sequential"
    multiplier: str | None = None
    norms: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    heads: Attention | None = None
    cross_heads: Attention | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
