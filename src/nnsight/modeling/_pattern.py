"""Attention patterns at the dropout behind the softmax, on releases that do not call that module any more.

Documents written for older `transformers` read `attn.attn_dropout.input`: the attention probabilities of a
layer.  Where such a read is made, that layer computes its attention eagerly, by the model's own eager function,
and the probabilities appear at the dropout's place, readable and writable.
"""

from __future__ import annotations

from torch.nn import Dropout, Module

from .._core import Worker
from ..names import INTERFACE, calls_interface, open_window


class PatternOnDemand:
    """Called before each request: makes a layer compute eagerly when its pattern is asked for."""

    def __call__(self, worker: Worker, module: Module, path: str) -> None:
        if type(module) is not Dropout or not path.endswith("attn_dropout"):
            return
        attention = worker.run.instruments.parent(module)
        if attention is not None and calls_interface(attention):
            open_window(worker.run, attention).show_pattern(INTERFACE, module)
