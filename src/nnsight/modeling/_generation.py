"""Generation: what `model.generator` shows, and how tokens are seen as they appear."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch.nn import Module

from .._core import OUTPUT, Place, current_pass
from ..envoy import Tree
from ._adapters import unwrapped

GENERATED = Place("model.generator.output", final=True, read_only=True)
TOKEN = Place("model.generator.streamer.output", read_only=True)


class Generator:
    """`model.generator`: the generation as a whole.

    `output` is what `generate` returns, `[batch, prompt + new tokens]`; `streamer.output` the token of each step as it
    appears, `[batch]`.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.streamer = Streamer(tree)

    @property
    def output(self) -> Any:
        """The generated token ids, prompt included; waits until the generation is over."""
        worker = self._tree.worker("model.generator", OUTPUT)
        return worker.run.read(worker, GENERATED, OUTPUT, GENERATED.name)[1]


class Streamer:
    """`model.generator.streamer`: the newest tokens."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    @property
    def output(self) -> torch.Tensor:
        """The token chosen in a step, for each row of the batch; waits until it is chosen."""
        worker = self._tree.worker("model.generator.streamer", OUTPUT)
        return worker.run.read(worker, TOKEN, OUTPUT, TOKEN.name)[1]


def generate(module: Any, **options: Any) -> Any:
    """Call `module.generate`, letting tokens and the result appear at their places."""
    from transformers import StoppingCriteriaList

    current = current_pass()
    if current is None:
        return module.generate(**options)
    criteria = [*(options.pop("stopping_criteria", None) or ()), _show_token]
    result = module.generate(stopping_criteria=StoppingCriteriaList(criteria), **options)
    return current.touch(GENERATED, result)


def stepper_of(module: Module) -> Module:
    """The part of a model whose calls are the steps of its generation: its own, or those of a model inside."""
    module = unwrapped(module)
    own = getattr(type(module), "generate", None)
    if own is None or own.__module__.startswith("transformers.generation."):
        return module
    try:
        source = inspect.getsource(own)
    except (OSError, TypeError):
        return module
    inner = set(_INNER.findall(source))
    if len(inner) != 1 or "super().generate(" in source:
        return module
    found = getattr(module, inner.pop(), None)
    return stepper_of(found) if isinstance(found, Module) else module


_INNER = re.compile(r"self\.(\w+)\.generate\(")


def _show_token(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    current = current_pass()
    if current is not None:
        current.touch(TOKEN, ids[:, -1])
    return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
