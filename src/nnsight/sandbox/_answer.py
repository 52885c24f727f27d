"""What a finished block leaves: its saved names, and what it changed in place of that which the job sent."""

from __future__ import annotations

from typing import Any

import torch

from .._capture import Block, Scope
from ..errors import TravelError
from ..modeling import take_apart
from ..protocol import Answer, Change, Encoder, GivenNode, Node, is_as_sent, results_of, state_of
from ..trace import Cache
from ._rebuild import JobReader

_ABSENT: Any = object()
_SMALL = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


class Given:
    """The containers and tensors that came with a job, as they were when its block began."""

    def __init__(self, reader: JobReader) -> None:
        self.containers = containers = reader.containers
        self.tensors = tensors = reader.tensors
        self._reader = reader
        self._before = {number: _contents(value) for number, value in containers.items()}
        self._versions = [_version(tensor) for tensor in tensors]
        self._numbers = {id(value): number for number, value in containers.items()}
        self._tensor_numbers = {id(tensor): number for number, tensor in enumerate(tensors)}

    def holds(self, value: Any) -> bool:
        """Whether the job sent this very object."""
        return id(value) in self._numbers or id(value) in self._tensor_numbers

    def extend(self, _encoder: Encoder, value: Any) -> Node | None:
        """The node for an object that the job sent, or that cannot leave."""
        if id(value) in self._tensor_numbers:
            return GivenNode(self._tensor_numbers[id(value)], True)
        if id(value) in self._numbers:
            return GivenNode(self._numbers[id(value)], False)
        return None

    def changed(self) -> list[int]:
        """The containers whose contents are others than before."""
        return [n for n, before in self._before.items() if not _same(before, _contents(self.containers[n]))]

    def changed_tensors(self) -> list[int]:
        """The tensors that were changed in place, or have another gradient."""
        infos, payload = self._reader.job.tensors, self._reader.payload
        return [
            number
            for number, tensor in enumerate(self.tensors)
            if _version(tensor) != self._versions[number] or not is_as_sent(tensor, infos[number], payload)
        ]


def write_answer(encoder: Encoder, block: Block, scope: Scope, saved: list[Any], given: Given) -> Answer:
    """The answer of a block that has run.

    Raises:
        TravelError: A saved value cannot be sent, or an unsaved one was put into a container that the job sent.
    """
    known = {id(value) for value in saved}
    names: dict[str, Any] = {}
    unsaved: list[str] = []
    for name in sorted(block.names_bound):
        value = scope.get(name, _ABSENT)
        if value is _ABSENT:
            continue
        if _is_saved(value, known, given):
            names[name] = encoder.encode(value, name)
        else:
            unsaved.append(name)
    changes = [_change(encoder, number, known, given) for number in given.changed()]
    changes += [Change(n, True, _tensor(encoder, given.tensors[n])) for n in given.changed_tensors()]
    return Answer(names, unsaved, changes, encoder.contents, encoder.tensors.infos)


def _version(tensor: torch.Tensor) -> tuple[int, int, int]:
    """What is another one after every change; an inference tensor cannot be changed outside of inference mode."""
    if tensor.is_inference():
        return (0, 0, 0)
    gradient = tensor.grad if tensor.is_leaf else None
    return (tensor._version, id(gradient), gradient._version if gradient is not None else 0)


def _tensor(encoder: Encoder, tensor: torch.Tensor) -> Any:
    fresh = tensor.detach().clone()
    if tensor.is_leaf and tensor.grad is not None:
        fresh.grad = tensor.grad.detach()
    return encoder.encode(fresh, "a changed tensor")


def _change(encoder: Encoder, number: int, known: set[int], given: Given) -> Change:
    container = given.containers[number]
    contents = _contents(container)
    before = {id(item) for item in _parts(given._before[number])}
    known = known | {id(item) for item in results_of(container).values()}
    for item in _parts(contents):
        if id(item) not in before and not isinstance(item, _SMALL) and not _is_saved(item, known, given):
            raise TravelError(
                f"A {type(item).__name__} was put into a {type(container).__name__} from outside the block, and not "
                "saved. Only what is saved leaves a remote block: save it where it is put there, "
                "`results.append(value.save())`."
            )
    fresh = list(contents) if isinstance(contents, tuple) else dict(contents)
    return Change(number, False, encoder.encode(fresh, "a changed container"))


def _contents(value: Any) -> tuple[Any, ...] | dict[Any, Any]:
    if isinstance(value, dict):
        return dict(value)
    return tuple(value) if isinstance(value, (list, set)) else state_of(value)


def _parts(contents: tuple[Any, ...] | dict[Any, Any]) -> list[Any]:
    return list(contents) if isinstance(contents, tuple) else [*contents.keys(), *contents.values()]


def _same(before: tuple[Any, ...] | dict[Any, Any], now: tuple[Any, ...] | dict[Any, Any]) -> bool:
    old, new = _parts(before), _parts(now)
    return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))


def _is_saved(value: Any, known: set[int], given: Given, depth: int = 0) -> bool:
    """Whether a value was saved, or is a container of saved values and small ones, with at least one saved."""
    if id(value) in known or isinstance(value, Cache):  # a cache is there to be kept
        return True
    if depth > 20 or not isinstance(value, (list, tuple, set, frozenset, dict)) or take_apart(value) is not None:
        return given.holds(value) and depth > 0
    parts = _parts(_contents(value) if not isinstance(value, (tuple, frozenset)) else tuple(value))
    large = [part for part in parts if not isinstance(part, _SMALL) or id(part) in known]
    return bool(large) and all(_is_saved(part, known, given, depth + 1) for part in large)
