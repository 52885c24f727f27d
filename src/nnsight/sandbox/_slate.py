"""Whether a process that has run a job may run another one of the same user: where nothing is left behind.

Most jobs that read and change values leave nothing. Of those that may, because they call functions of other libraries, set
attributes, or touch the weights, nobody asks what it was: their process ends.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

import torch

from .._capture import parse
from ..errors import ProtocolError
from ..protocol import EnvoyNode, ImportNode, Job, read_job
from ._together import can_share, state_of_model, words_in

_ASSIGNED = frozenset({"output", "input", "inputs"})
_LIBRARIES = frozenset({("torch", ""), ("torch.nn.functional", ""), ("math", "")})  # and no name in them
# What lasts in these and in the model's tokenizer, and the ways from them to the rest of Python.
_LASTING = frozenset(
    "tokenizer processor generator use_deterministic_algorithms backends hub library overrides utils os sys threading "
    "builtins importlib inspect types gc ctypes io pickle multiprocessing subprocess jit compile fx distributed package "
    "testing classes ops load".split()
)


def can_stay(frame: bytes) -> bool:
    """Whether the words of a job say that it leaves nothing behind; the server asks, which does not parse its block."""
    try:
        job, _ = read_job(frame)
    except ProtocolError:
        return False
    words = words_in(job.main.block.source)
    plain = not words & _LASTING and not any(word.startswith(("set_", "_")) for word in words - {"_"})
    return plain and can_share(job, len(frame)) and _brings_data(job)


def _brings_data(job: Job) -> bool:
    """Whether the names that a block reads stand for values, modules of the model, or libraries that are known."""
    values = [node for space in job.namespaces for node in space.values.values()]
    values += job.main.variables.values()
    imported = [(node.module, node.name) for node in values if isinstance(node, ImportNode)]
    return set(imported) <= _LIBRARIES and not any(isinstance(node, EnvoyNode) and node.attribute for node in values)


class Slate:
    """A process that has run nobody's code so far."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._before = self._state()

    def _state(self) -> Any:
        defaults = torch.get_default_dtype(), torch.get_num_threads(), torch.get_default_device()
        return state_of_model(self._model), defaults, torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def is_clean(self, frames: Iterable[bytes]) -> bool:
        """Whether the jobs in these frames, which have run here, have left nothing behind."""
        return all(can_stay(frame) and _only_computes(frame) for frame in frames) and self._before == self._state()


def _only_computes(frame: bytes) -> bool:
    """Whether a block sets nothing but variables, items and the model's values."""
    attributes = [
        node for node in ast.walk(parse(read_job(frame)[0].main.block.source)) if isinstance(node, ast.Attribute)
    ]
    return all(isinstance(node.ctx, ast.Load) or node.attr in _ASSIGNED for node in attributes)
