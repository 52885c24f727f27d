"""Selection: which tensors of a forward hold rows that the model picked out by their numbers.

A mixture of experts hands each expert the tokens that a router chose, or sorts all tokens by expert.  What is
computed from such a tensor, until it is put back where it came from, belongs to rows that only the data tells, however
its shape looks: a trial run in which all tokens happen to go the same way would show nothing.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

from ._tensors import tensors_in

_PICKS = {"index.Tensor": None, "index_select.default": 1, "gather.default": 1}  # where the dimension is given
_ALWAYS = {"masked_select.default", "take.default"}
_PUTS = ("index_put", "index_add", "index_copy", "scatter", "masked_scatter", "_index_put_impl")
_FACTORIES = ("_like", "new_", "empty", "zeros", "ones", "full", "arange", "scalar_tensor")
_FROM_DATA, _CHOSEN, _PICKED = 1, 2, 4  # made from inputs; whole numbers made from an activation; rows picked by such


class Selection(TorchDispatchMode):
    """Where it is on, it follows what is made of activations; `holds` tells of a tensor whether its rows were picked."""

    def __init__(self, root: Module) -> None:
        super().__init__()
        self._marks: dict[int, int] = {}
        self._alive: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
        for tensor in (*root.parameters(), *root.buffers()):
            self._mark(tensor, 0)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` holds rows that were picked by their numbers."""
        return bool(self._marks_of(tensor) & _PICKED)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        marks = [self._marks_of(tensor) for tensor in inputs]
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            self._mark(tensor, self._made(func, args, inputs, marks, tensor))
        return result

    def _made(
        self, func: Any, args: tuple[Any, ...], inputs: list[torch.Tensor], marks: list[int], made: torch.Tensor
    ) -> int:
        name = func.__name__
        if not inputs or any(part in name for part in _FACTORIES):
            return 0
        found = _FROM_DATA if any(mark & _FROM_DATA for mark in marks) else 0
        if not made.is_floating_point() and not made.is_complex():
            from_activation = any(m & _FROM_DATA and t.is_floating_point() for t, m in zip(inputs, marks, strict=True))
            if from_activation or any(mark & _CHOSEN for mark in marks):
                found |= _CHOSEN
        picked = bool(marks[0] & _PICKED) if name.startswith(_PUTS) else any(mark & _PICKED for mark in marks)
        if _picks_rows(name, args) and marks[0] & _FROM_DATA and any(mark & _CHOSEN for mark in marks[1:]):
            picked = not marks[0] & _PICKED  # what was picked once is put back in order by a second time
        return found | (_PICKED if picked else 0)

    def _marks_of(self, tensor: torch.Tensor) -> int:
        # What was made where this is not on, as the inputs, is data.
        return self._marks[id(tensor)] if self._alive.get(id(tensor)) is tensor else _FROM_DATA

    def _mark(self, tensor: torch.Tensor, mark: int) -> None:
        self._alive[id(tensor)] = tensor
        self._marks[id(tensor)] = mark


def _picks_rows(name: str, args: tuple[Any, ...]) -> bool:
    if name in _ALWAYS:
        return True
    if name not in _PICKS:
        return False
    position = _PICKS[name]
    return args[1][0] is not None if position is None else args[position] == 0
