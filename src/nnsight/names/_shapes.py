"""Shapes: a tensor of the model as the vocabulary shows it, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..errors import EditError


class Shape(Protocol):
    """How a tensor of the model is shown."""

    def show(self, tensor: torch.Tensor) -> torch.Tensor:
        """It in the vocabulary's shape; a view of the same memory where there is one."""
        ...

    def take(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The tensor to put in place of `tensor` where `new` was assigned to what `show` gives."""
        ...


class AsItIs:
    """The model's own shape."""

    def show(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def take(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return new


@dataclass(frozen=True)
class ByHead:
    """`[batch, pos, head * d_head]` as `[batch, pos, head, d_head]`."""

    heads: int

    def show(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (self.heads, -1))

    def take(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return new.flatten(-2)


class HeadsFirst:
    """`[batch, head, pos, d_head]` as `[batch, pos, head, d_head]`."""

    def show(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2)

    def take(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return new.transpose(1, 2)


@dataclass(frozen=True)
class InRows:
    """`[batch * pos, d]` as `[batch, pos, d]`."""

    positions: int

    def show(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (-1, self.positions))

    def take(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return new.flatten(0, 1)


class Part:
    """A part of a tensor that holds more."""

    def show(self, tensor: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def take(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        whole = tensor.clone()
        self.show(whole).copy_(new)
        return whole


@dataclass(frozen=True)
class Blocks(Part):
    """Queries, keys and values one behind the other: `part` 0, 1 or 2, of so many heads."""

    heads: tuple[int, int, int]
    part: int

    def show(self, tensor: torch.Tensor) -> torch.Tensor:
        start = sum(self.heads[: self.part])
        by_head = tensor.unflatten(-1, (sum(self.heads), -1))
        return by_head.narrow(-2, start, self.heads[self.part])


@dataclass(frozen=True)
class Interleaved(Part):
    """Query, key and value of each head side by side."""

    heads: int
    part: int

    def show(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (self.heads, 3, -1)).select(-2, self.part)


@dataclass(frozen=True)
class Grouped(Part):
    """For each head of keys and values its queries, its key, its value."""

    heads: int
    kv_heads: int
    part: int

    def show(self, tensor: torch.Tensor) -> torch.Tensor:
        grouped, queries = self._grouped(tensor)
        return (
            grouped.narrow(-2, 0, queries).flatten(-3, -2) if self.part == 0 else grouped.select(-2, self._at(queries))
        )

    def take(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self.part:
            return super().take(tensor, new)
        whole = tensor.clone()
        grouped, queries = self._grouped(whole)
        grouped.narrow(-2, 0, queries).copy_(new.unflatten(-2, (self.kv_heads, queries)))
        return whole

    def _grouped(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        queries = self.heads // self.kv_heads
        return tensor.unflatten(-1, (self.kv_heads, queries + 2, -1)), queries

    def _at(self, queries: int) -> int:
        return queries + self.part - 1


@dataclass(frozen=True)
class Latent(Part):
    """What DeepSeek's attention makes of its latent, `[batch, 1, pos, head * (d_key + d_value)]`: the keys or values."""

    heads: int
    d_value: int
    part: int

    def show(self, tensor: torch.Tensor) -> torch.Tensor:
        by_head = tensor.squeeze(1).unflatten(-1, (self.heads, -1))
        d_key = by_head.shape[-1] - self.d_value
        return by_head.narrow(-1, 0, d_key) if self.part == 1 else by_head.narrow(-1, d_key, self.d_value)


def fit(value: Any, like: torch.Tensor, path: str) -> torch.Tensor:
    """What is assigned, as a tensor of the shape, dtype and device of `like`; it is broadcast as in `like[:] = value`."""
    if isinstance(value, (int, float)):
        return torch.full_like(like, value)
    if not isinstance(value, torch.Tensor):
        raise EditError(f"{path} is a tensor and was assigned a {type(value).__name__}.")
    if value.dtype != like.dtype or value.device != like.device:
        value = value.to(like)
    if value.shape == like.shape:
        return value
    try:
        return value.expand(like.shape).clone()
    except RuntimeError:
        raise EditError(
            f"{path} has shape {list(like.shape)} here and was assigned a tensor of shape {list(value.shape)}."
        ) from None
