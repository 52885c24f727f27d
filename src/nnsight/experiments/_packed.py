"""Packed rows: of each only the positions from its edit on are computed, two or more side by side in a row of the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nnsight import LanguageModel

from ._prompts import Prompts

NEEDED = {"past_key_values", "position_ids", "attention_mask", "use_cache"}
"""What a model's forward takes where its rows can be packed."""


class Layout:
    """Where the computed positions of some rows stand in a batch of fewer rows.

    In a causal model an edit at a position changes nothing before it. So a row is computed from its edit on, and sees what
    lies before in the plain run's cache. A row edited at position `p` and one edited at `length - 1 - p` fill `length + 1`
    places, and a mask keeps them apart.

    Args:
        prompts: The number of each row's prompt.
        starts: The first position of each row that is computed.
        real: Which positions are tokens, not padding: `[prompt, pos]`.
    """

    def __init__(self, prompts: Sequence[int], starts: Sequence[int], real: torch.Tensor) -> None:
        self._real = real
        self.length = real.shape[1]
        self.width = self.length + 1
        self.rows = len(starts)
        bins = self._fill(prompts, starts)
        self.prompts = torch.tensor([prompt for prompt, _ in bins])
        self.row = torch.full((len(bins), self.width), -1)  # whose a place is, -1 for nobody's
        self.pos = torch.zeros(len(bins), self.width, dtype=torch.long)
        self.start = torch.zeros(len(bins), self.width, dtype=torch.long)
        ends = torch.zeros(self.rows, 2, dtype=torch.long)
        for number, (_, rows) in enumerate(bins):
            place = 0
            for row in rows:
                stop = place + self.length - starts[row]
                self.row[number, place:stop] = row
                self.pos[number, place:stop] = torch.arange(starts[row], self.length)
                self.start[number, place:stop] = starts[row]
                ends[row] = torch.tensor([number, stop - 1])
                place = stop
        self.ends = ends.unbind(1)
        self._taken = self.row >= 0

    def _fill(self, prompts: Sequence[int], starts: Sequence[int]) -> list[tuple[int, list[int]]]:
        """The prompt and the rows of each row of the batch: the longest first, each where it fits."""
        bins: list[tuple[int, list[int]]] = []
        left: list[int] = []
        for row in sorted(range(len(starts)), key=lambda row: starts[row]):
            size = self.length - starts[row]
            fits = (i for i, (prompt, _) in enumerate(bins) if prompt == prompts[row] and left[i] >= size)
            number = next(fits, len(bins))
            if number == len(bins):
                bins.append((prompts[row], []))
                left.append(self.width)
            bins[number][1].append(row)
            left[number] -= size
        return bins

    def of_prompts(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[prompt, pos, …]` in the batch's places."""
        return values[self.prompts[:, None].to(values.device), self.pos.to(values.device)]

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[row, pos, …]` in the batch's places."""
        return values[self.row.clamp(min=0).to(values.device), self.pos.to(values.device)]

    def unpack(self, live: torch.Tensor) -> torch.Tensor:
        """A live value as `[row, pos, …]`, zero before each row's start."""
        values = live.new_zeros(self.rows, self.length, *live.shape[2:])
        values[self.row[self._taken], self.pos[self._taken]] = live[self._taken]
        return values

    def put(self, live: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The live value with the values `[row, pos, …]` of all rows."""
        return self.pack(new)

    def inputs(self, ids: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The model's inputs, from those of the prompts `[prompt, pos]`; nobody's places see themselves alone."""
        real = self._real[self.prompts]
        past = (torch.arange(self.length) < self.start[..., None]) & real[:, None]
        own = (self.row[:, :, None] == self.row[:, None]) & (self.pos[:, None] <= self.pos[:, :, None])
        own = own & (real.gather(1, self.pos) & self._taken)[:, None]
        seen = torch.cat([past & self._taken[..., None], own | torch.eye(self.width, dtype=torch.bool)], -1)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return {
            "input_ids": self.of_prompts(ids),
            "position_ids": self.of_prompts(positions),
            "attention_mask": mask[:, None],
        }

    def cache(self, plain: Any, layer: int) -> Any:
        """The plain run's cache for each row of the batch, of `layer` and those behind."""
        found = copy.copy(plain)
        found.layers = [copy.copy(one) for one in plain.layers]
        for one in found.layers[layer:]:
            one.batch_select_indices(self.prompts.to(one.keys.device))
        return found


class Packing:
    """Runs of packed rows, which see what lies before them in the cache of the plain run.

    Args:
        model: The model.
        prompts: The batch.
        caches: What the plain run left, of parts of the batch.
        stream: The plain run's residual stream before each layer, `[layer, prompt, pos, d_model]`.
        options: Of every run.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Prompts,
        caches: Sequence[Any],
        stream: torch.Tensor,
        options: dict[str, Any],
    ) -> None:
        self._model = model
        self._stream = stream
        self._options = {**options, "use_cache": True}
        self._cache = _joined(caches)
        self._real = prompts.real()
        given = prompts.inputs()
        self._ids = given if isinstance(given, torch.Tensor) else given["input_ids"]
        self._positions = (self._real.cumsum(-1) - 1).clamp(min=0)

    def tensors(self) -> list[torch.Tensor]:
        """What is kept."""
        return [tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values)]

    def halves(self, prompts: Sequence[int]) -> Layout:
        """Two ends of each of these prompts, side by side."""
        middle = (self._real.shape[1] - 1) // 2
        return self.layout([prompt for prompt in prompts for _ in range(2)], [middle, middle + 1] * len(prompts))

    def layout(self, prompts: Sequence[int], starts: Sequence[int]) -> Layout:
        """The places of rows with these prompts, computed from these positions on."""
        return Layout(prompts, starts, self._real)

    def run(self, layout: Layout, layer: int, act: Callable[[], Any], *, trim: bool) -> torch.Tensor:
        """What leaves the last layer `[row, 1, d_model]` at each row's last position, in a run from `layer` on.

        With `trim`, the last layer's MLP computes the last positions alone.
        """
        names, last = self._model.names, len(self._stream) - 1
        inputs = layout.inputs(self._ids, self._positions, self._stream.dtype)
        with self._model.trace(inputs, past_key_values=layout.cache(self._cache, layer), **self._options) as tracer:
            if layer:
                stream = layout.of_prompts(self._stream[layer])
                for earlier in range(layer):
                    names.layers[earlier].skip(stream)
            act()
            if trim:
                mlp = names.layers[last].mlp
                whole = torch.zeros_like(mlp.input)
                mlp.input = mlp.input[layout.ends][None]
                whole[layout.ends] = mlp.output[0]
                mlp.output = whole
            found = names.resid_post[last][layout.ends][:, None]
            tracer.stop()
        return found


def _joined(caches: Sequence[Any]) -> Any:
    first, *others = caches
    for number, layer in enumerate(first.layers):
        layer.keys = torch.cat([layer.keys, *(other.layers[number].keys for other in others)])
        layer.values = torch.cat([layer.values, *(other.layers[number].values for other in others)])
    return first
