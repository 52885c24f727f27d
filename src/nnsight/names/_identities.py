"""Identities: what the values of a layer have to do with each other, by its family's row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ._family import Attention

if TYPE_CHECKING:
    from ._stack import Stack

Values = dict[str, torch.Tensor]
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2}
_COARSE = 6e-2


class Identities:
    """Computes them, and calls `fail(names, what was found)` where one does not hold."""

    def __init__(self, stack: Stack, fail: Callable[[list[str], str], None]) -> None:
        self._stack = stack
        self._fail = fail

    def entry(self, entering: list[torch.Tensor], values: Values) -> None:
        """What is embedded enters the first layer."""
        stack, stream = self._stack, values.get("resid_pre")
        if stream is None or not entering:
            return
        total = sum(entering[1:], entering[0])
        if stack.row.entry_scale is not None:
            total = total * getattr(stack.config, stack.row.entry_scale)
        self._same(["embed", "resid_pre"], "the embeddings and what enters layer 0", total, stream)

    def passed_on(self, last: torch.Tensor, values: Values) -> None:
        """Each layer is given what the one before it gave."""
        if "resid_pre" in values:
            what = "what one layer gives and what the next is given"
            self._same(["layers", "resid_pre", "resid_post"], what, last, values["resid_pre"])

    def stream(self, index: int, values: Values) -> None:
        """The residual stream adds up."""
        row, at = self._stack.row, f"at layer {index}"
        first = "mixer_out" if "mixer_out" in values else "attn_out"
        factor = 1.0 if row.multiplier is None else getattr(self._stack.config, row.multiplier)
        pre, mid, post = (values.get(f"resid_{name}") for name in ("pre", "mid", "post"))
        added = {name: values[name] * factor for name in (first, "cross_out", "mlp_out") if name in values}
        if pre is None or post is None or first not in added:
            return
        if row.stream == "post_norm":
            self._post_norm(values, added)
            return
        if mid is not None:
            self._same([first, "resid_mid"], f"resid_pre + {first} and resid_mid {at}", pre + added[first], mid)
        total = sum(added.values(), pre)
        self._same([*added, "resid_post"], f"resid_pre + {' + '.join(added)} and resid_post {at}", total, post)

    def _post_norm(self, values: Values, added: Values) -> None:
        total, norms = values["resid_pre"], self._stack.row.norms
        if len(norms) != len(added):
            self._fail([*added], f"the row has {len(norms)} norms for the {len(added)} sums of a layer")
            return
        for name, norm in zip(added, norms, strict=True):
            given, after = values.get(f"{name} {norm} input"), values.get(f"{name} {norm} output")
            if given is None or after is None:
                return
            what = f"the stream with {name} added and what {norm} is given"
            self._same([name], what, total + added[name], given)
            total = after
            stream = {"attn_out": "resid_mid", "mlp_out": "resid_post"}.get(name)
            if stream is not None and stream in values:
                self._same([stream], f"what {norm} gives and {stream}", total, values[stream])

    def heads(self, index: int, prefix: str, row: Attention, values: Values) -> None:
        """The heads' results are the attention's output; the pattern mixes the values; queries and keys are those used."""
        at = f"at layer {index}"
        result, projected = values.get(f"{prefix}result"), values.get(f"{prefix}result projected")
        if result is not None and projected is not None:
            projection = self._stack.module(index, row.out.split("."), f"{prefix}result")
            mixed = values.get(f"{prefix}z")
            bias = 0 if mixed is None else projection(torch.zeros_like(mixed[:1, :1].flatten(-2)))
            total = result.sum(-2) + bias
            names = [f"{prefix}result", f"{prefix}z"]
            self._same(names, f"the heads' results with the bias and what the projection gives {at}", total, projected)
        pattern, z, v = (values.get(f"{prefix}{name}") for name in ("pattern", "z", "v"))
        if pattern is not None and z is not None and v is not None:
            v = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
            mixed = torch.einsum("bhqk,bkhd->bqhd", pattern.to(v.dtype), v)
            names = [f"{prefix}{name}" for name in ("pattern", "z", "v")]
            self._same(names, f"the values mixed by the pattern and z {at}", mixed, z)
        self._queries_and_keys(prefix, row, values, at)

    def _queries_and_keys(self, prefix: str, row: Attention, values: Values, at: str) -> None:
        for what in "qk":
            rotated, plain = values.get(f"{prefix}{what}_rot"), values.get(f"{prefix}{what}")
            given = values.get(f"{prefix}{what} given")
            used = rotated if rotated is not None else plain
            if given is not None and used is not None:
                name = f"{prefix}{what}_rot" if rotated is not None else f"{prefix}{what}"
                text = f"{name} and what the attention function is given {at}"
                self._same([name], text, _normalised(used, given), _normalised(given, given))
            before = values.get(f"{prefix}{what} unrotated")
            if before is not None and plain is not None and not row.normed:
                text = f"{prefix}{what} and what is rotated {at}"
                each = before.shape[2] // plain.shape[2]  # some repeat keys for the queries' heads first
                self._same([f"{prefix}{what}"], text, plain.repeat_interleave(each, 2), before)

    def final(self, last: torch.Tensor | None, entering: torch.Tensor | None) -> None:
        """The last layer's stream enters the final norm."""
        if last is not None and entering is not None:
            what = "what the last layer gives and what the final norm is given"
            self._same(["final_norm", "resid_post"], what, last, entering)

    def head(
        self, normed: torch.Tensor | None, given: torch.Tensor | None, out: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """Final norm and unembedding give the logits."""
        row, stack = self._stack.row, self._stack
        if normed is not None and given is not None and not row.bridge:
            self._same(["final_norm", "unembed"], "what the final norm gives and what is unembedded", normed, given)
        value = stack.head_value()
        if value is not None and row.head == "capped":
            out = torch.tanh(out / value) * value
        elif value is not None and row.head == "divided":
            out = out / value
        elif value is not None and row.head == "multiplied":
            out = out * value
        elif value is not None and row.head == "biased":
            out = out + value.to(out)
        self._same(["logits", "unembed"], "what the unembedding gives and the logits", out, logits)

    def _same(self, names: list[str], what: str, one: torch.Tensor, other: torch.Tensor) -> None:
        if one.dim() != other.dim() or any(a not in (b, 1) for a, b in zip(one.shape, other.shape, strict=True)):
            self._fail(names, f"{what} had shapes {list(one.shape)} and {list(other.shape)}")
            return
        tolerance = _TOLERANCE.get(other.dtype, _COARSE)
        one, other = one.to(other.device, torch.float64), other.to(torch.float64)
        scale = float(other.abs().max()) if other.numel() else 0.0
        difference = float((one - other).abs().max()) if other.numel() else 0.0
        if not difference <= tolerance * scale + 1e-12:  # NaN is no agreement
            self._fail(names, f"{what} differed by {difference:.3g}, at a size of {scale:.3g}")


def _normalised(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Without its scale, which some models apply on the way, others in the function."""
    tensor = tensor.to(torch.float64)
    return (tensor / tensor.norm().clamp(min=1e-30)).to(torch.float32 if like.dtype == torch.float32 else like.dtype)
