"""An answer's values, put where the user's code expects them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from .._capture import Block, Scope
from ..errors import ProtocolError
from ..protocol import Answer, Change, Decoder, Failure, read_outcome, read_tensors, state_of
from ._failure import exception_of
from ._job import Written
from ._unsaved import NotSaved


def read_answer(frame: bytes | memoryview, written: Written) -> dict[str, Any]:
    """The saved values by name; what the block changed in place is changed here too.

    Raises:
        ProtocolError: The bytes are no answer to this job.
        BaseException: What the block raised.
    """
    outcome, payload = read_outcome(frame)
    if isinstance(outcome, Failure):
        raise exception_of(outcome, written.definitions)
    tensors = read_tensors(outcome.tensors, payload)
    decoder = Decoder(tensors, outcome.containers, (written.containers, written.tensors))
    values = {name: decoder.decode(node) for name, node in outcome.names.items()}
    for change in outcome.changes:
        _apply(change, decoder, written)
    return values | {name: _UNSAVED for name in outcome.unsaved if name not in values}


_UNSAVED: Any = object()


def saved_only(values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that were saved."""
    return {name: value for name, value in values.items() if value is not _UNSAVED}


def bind_names(values: dict[str, Any], block: Block, scope: Scope) -> None:
    """Bind the names in the user's frame, as after any `with`; those not saved to what says so."""
    place = f"line {block.line} of {os.path.basename(block.filename)}"
    names = [name for name in values if name in block.names_bound and name not in block.target_names()]
    for name in names:
        value = values[name]
        scope.set(name, NotSaved(name, place) if value is _UNSAVED else value)
    scope.write_back(names)


def _apply(change: Change, decoder: Decoder, written: Written) -> None:
    mine = _given(written.tensors if change.tensor else written.containers, change.index)
    new = decoder.decode(change.value)
    if change.tensor:
        if not isinstance(new, torch.Tensor) or new.shape != mine.shape:
            raise ProtocolError("a changed tensor has another shape than the one that was sent")
        with torch.no_grad():
            mine.copy_(new)
        if new.grad is not None:
            mine.grad = new.grad.to(mine.device)
    elif isinstance(mine, list) and isinstance(new, list):
        mine[:] = new
    elif isinstance(mine, set) and isinstance(new, list):
        mine.clear()
        mine.update(new)
    elif isinstance(new, dict):
        target = mine if isinstance(mine, dict) else vars(mine)
        for name in mine.copy() if isinstance(mine, dict) else state_of(mine):  # what did not go with the job stays
            del target[name]
        target.update(new)
    else:
        raise ProtocolError("a changed container is of another kind than the one that was sent")


def _given(values: Sequence[Any], index: int) -> Any:
    if not 0 <= index < len(values):
        raise ProtocolError(f"the job sent no value {index}")
    return values[index]


__all__ = ["Answer", "bind_names", "read_answer", "saved_only"]
