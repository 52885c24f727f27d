"""Accesses: from a family's row to the way each of its names is read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import NamesError
from ._access import Access, InAttention, Operation, Pattern, Result, Shown, Whole
from ._family import Attention, Spot
from ._ports import Keep
from ._shapes import Blocks, ByHead, Grouped, HeadsFirst, Interleaved, Latent, Shape
from ._terms import HEAD, LAYER
from ._window import INTERFACE

if TYPE_CHECKING:
    from ._stack import Stack

_PARTS = {"q": 0, "k": 1, "v": 2}


def make_access(stack: Stack, name: str) -> Access:
    """The access of a name in a stack.

    Raises:
        NamesError: The family has no such value; the message says why.
    """
    row = stack.row
    if name in row.refused:
        raise NamesError(f"{stack.kind} has no {name}: {row.refused[name]}")
    if name == "logits":
        stack.path_of("unembed")
        return Whole(stack, name, "", "logits")
    if name in ("embed", "final_norm"):
        return Whole(stack, name, stack.path_of(name))
    for prefix, attention in (("cross_head_", row.cross_heads), ("head_", row.heads)):
        if name.startswith(prefix):
            if attention is None:
                raise NamesError(_NO_HEADS.format(kind=stack.kind, name=name, what=_WHAT[prefix]))
            return _of_heads(stack, name, attention, name.removeprefix(prefix))
    text = getattr(row, name, None) if name in LAYER else None
    if text is None:
        raise NamesError(f"{stack.kind} has no {name}. It has: {', '.join(stack.names())}.")
    spot = Spot.parse(text)
    keep: Keep = ("own" if spot.kind == "input" else "left") if name in row.apart else "shared"
    if name == "resid_mid" and spot.kind == "input":
        keep = "held"  # the layer adds the MLP's output to the same tensor
    if keep == "shared" and name not in row.flat:
        return Access(stack, name, spot)
    return Shown(stack, name, spot, keep=keep, flat=name in row.flat)


def _of_heads(stack: Stack, name: str, row: Attention, what: str) -> Access:
    heads = stack.count(row.heads)
    if what == "z":
        return InAttention(stack, name, row, Spot.parse(f"{row.out}.input"), ByHead(heads))
    if what == "result":
        return Result(stack, name, row, Spot.parse(f"{row.out}.output"))
    if what == "pattern":
        return _pattern(stack, name, row)
    text = getattr(row, what)
    if text is None:
        raise NamesError(
            f"{stack.kind} has no {name}: it has no rotary embedding, so {name.removesuffix('_rot')} is all."
        )
    if what in ("q_rot", "k_rot"):
        return Operation(stack, name, row, Spot.parse(text), HeadsFirst())
    return InAttention(stack, name, row, Spot.parse(text), _split(stack, row, what))


def _split(stack: Stack, row: Attention, what: str) -> Shape:
    part, heads = _PARTS[what], stack.count(row.heads)
    kv_heads = stack.count(row.kv_heads, heads)
    if row.split == "blocks":
        return Blocks((heads, kv_heads, kv_heads), part)
    if row.split == "interleaved":
        return Interleaved(heads, part)
    if row.split == "grouped":
        return Grouped(heads, kv_heads, part)
    if row.split == "latent" and part:
        return Latent(heads, stack.count("v_head_dim"), part)
    return ByHead(heads if what == "q" else kv_heads)


def _pattern(stack: Stack, name: str, row: Attention) -> Access:
    text = row.pattern_in(stack.implementation())
    if text is None:
        known = ", ".join(row.pattern)
        raise NamesError(f"{stack.kind} shows its pattern with attn_implementation {known} only.")
    if text == "interface":
        return Pattern(stack, name, row, Spot(INTERFACE, "input", 0, True))
    if text.startswith("sdpa:"):
        return Pattern(stack, name, row, Spot(text.removeprefix("sdpa:"), "input", 0, True))
    spot = Spot.parse(text)
    return Operation(stack, name, row, spot, keep="own") if spot.is_operation else Shown(stack, name, spot, keep="own")


def names_of(stack: Stack) -> list[str]:
    """The names of values that the family has."""
    row = stack.row
    names = [name for name in LAYER if "head_" not in name and getattr(row, name) is not None]
    for prefix, attention in (("head_", row.heads), ("cross_head_", row.cross_heads)):
        if attention is not None:
            names += [prefix + what for what in HEAD if what not in ("q_rot", "k_rot") or getattr(attention, what)]
    return [name for name in LAYER if name in names and name not in row.refused]


_WHAT = {"head_": "attention with heads", "cross_head_": "attention to an encoder"}
_NO_HEADS = "{kind} has no {name}: it has no {what}."
