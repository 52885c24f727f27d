"""Inputs of pipelines: several prompts as one batch, each with the noise of its own seed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import InputError
from ...trace import Given

_OF_ROWS = (
    *("prompt", "prompt_2", "prompt_3", "prompt_4", "negative_prompt", "negative_prompt_2", "negative_prompt_3"),
    *("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    *("prompt_attention_mask", "negative_prompt_attention_mask", "prompt_embeds_mask", "negative_prompt_embeds_mask"),
    *("image", "mask_image", "control_image", "class_labels", "batch_size", "latents", "generator", "seed"),
)
_SAMPLES = 4
_STEPS = 2  # of a trial: some schedulers need more than one


def first_argument(pipeline: Any) -> str:
    """What the pipeline takes first: a prompt, class labels, an image."""
    return next(name for name in inspect.signature(type(pipeline).__call__).parameters if name != "self")


def read(given: Given, first: str) -> dict[str, Any]:
    """The named inputs of a trace or an invoke."""
    if not given.args:
        return dict(given.kwargs)
    if first in given.kwargs:
        raise InputError(f"{first} is given twice, as the first argument and by name.")
    return {first: given.args[0] if len(given.args) == 1 else list(given.args), **given.kwargs}


class Inputs:
    """The inputs of all invokes, as the pipeline takes them."""

    def __init__(self, parts: Sequence[dict[str, Any]], shared: Mapping[str, Any]) -> None:
        for part in parts:
            unknown = [name for name in part if name not in _OF_ROWS]
            if len(parts) > 1 and unknown:
                raise InputError(_SHARED.format(names=", ".join(unknown)))
        self._parts = [dict(part) for part in parts]
        self._shared = dict(shared)
        self._seed = self._shared.pop("seed", None)
        self.sizes = [count_rows({**self._shared, **part}) for part in parts]
        self.rows = sum(self.sizes)
        self.each = self._shared.get("num_images_per_prompt") or 1

    def for_pipeline(self) -> dict[str, Any]:
        """The arguments of one call of the pipeline."""
        parts = [dict(part) for part in self._parts]
        generators = self._generators(parts)
        if len(parts) == 1:
            inputs = {**self._shared, **parts[0]}
        else:
            names = dict.fromkeys(name for part in parts for name in part)
            inputs = {**self._shared, **{name: self._join(name, parts) for name in names}}
        negative = inputs.get("negative_prompt")
        if isinstance(negative, str) and isinstance(inputs.get("prompt"), list):
            inputs["negative_prompt"] = [negative] * self.rows
        if generators is not None:
            inputs["generator"] = generators[0] if len(generators) == 1 else generators
        return inputs

    def _generators(self, parts: list[dict[str, Any]]) -> list[torch.Generator] | None:
        """One for each image: those of an input draw from its generator in turn."""
        seeds = [part.pop("seed", self._seed) for part in parts]
        if all(seed is None for seed in seeds):
            given = [part.pop("generator", None) for part in parts]
            return self._spread(given) if any(generator is not None for generator in given) else None
        if any("generator" in part for part in (*parts, self._shared)):
            raise InputError("Give seed=… or generator=…, not both: each says where the noise comes from.")
        return self._spread([_seeded(seed) for seed in seeds])

    def _spread(self, given: Sequence[Any]) -> list[torch.Generator]:
        spread: list[torch.Generator] = []
        for generator, size in zip(given, self.sizes, strict=True):
            images = size * self.each
            if isinstance(generator, (list, tuple)):
                if len(generator) != images:
                    raise InputError(f"An input of {images} images was given {len(generator)} generators.")
                spread += generator
            else:
                spread += [_seeded(None) if generator is None else generator] * images
        return spread

    def _join(self, name: str, parts: list[dict[str, Any]]) -> Any:
        values: list[Any] = [part.get(name, self._shared.get(name)) for part in parts]
        if name == "batch_size":
            return self.rows
        if all(isinstance(value, torch.Tensor) for value in values):
            return torch.cat(values)
        if any(value is None for value in values):
            if not name.startswith("negative_prompt") or "embeds" in name:
                raise InputError(f"Only some of the invokes give {name}: give it to each of them, or to none.")
            values = ["" if value is None else value for value in values]
        return [item for value, size in zip(values, self.sizes, strict=True) for item in _as_rows(value, size)]

    def sample(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The arguments of a trial on these of four different rows, in few steps."""
        shared = {n: v for n, v in self._shared.items() if n not in ("timesteps", "sigmas", "generator", "callback")}
        shared.pop("callback_on_step_end", None)
        part = {name: value for name, value in self._parts[0].items() if name not in ("seed", "generator")}
        inputs = {**shared, **{name: _vary(name, value, numbers, self.sizes[0]) for name, value in part.items()}}
        for name in ("prompt", "negative_prompt", "class_labels", "latents", "batch_size"):
            if name in shared:
                inputs[name] = _vary(name, shared[name], numbers, self.rows)
        strength = inputs.get("strength")
        inputs["num_inference_steps"] = math.ceil(_STEPS / strength) if strength else _STEPS
        inputs["generator"] = [g for number in numbers for g in [_seeded(number)] * self.each]
        return inputs


def count_rows(inputs: Mapping[str, Any]) -> int:
    """How many prompts, or what stands for them, there are."""
    for name in ("prompt", "class_labels", "prompt_embeds", "image", "latents"):
        value = inputs.get(name)
        if isinstance(value, (list, tuple)):
            return len(value)
        if isinstance(value, torch.Tensor):
            return value.shape[0] if value.dim() > 2 or name == "class_labels" else 1
        if value is not None:
            return 1
    return int(inputs.get("batch_size") or 1)


def _as_rows(value: Any, size: int) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return list(value)
    rows = list(value) if isinstance(value, (list, tuple)) else [value] * size
    if len(rows) != size:
        raise InputError(f"An input of {size} prompts has {len(rows)} of something else: give one to each prompt.")
    return rows


def _vary(name: str, value: Any, numbers: Sequence[int], size: int) -> Any:
    if name == "batch_size":
        return len(numbers)
    if isinstance(value, torch.Tensor):
        row = value[:1] if value.shape[:1] == (size,) else value.unsqueeze(0)
        if row.is_floating_point():
            return torch.cat([row.roll(n, -1) * (1 - 0.15 * n) + 0.1 * n for n in numbers])
        return torch.cat([row] * len(numbers))
    first = value[0] if isinstance(value, (list, tuple)) else value
    if isinstance(first, str):
        return [f"{first} {' '.join('abcd'[: number + 1])}" for number in numbers]
    return [first] * len(numbers)


def _seeded(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)


_SHARED = """\
{names} cannot differ between the prompts of one batch: give it to generate() or trace(), for all of them, or generate the \
prompts one by one."""
