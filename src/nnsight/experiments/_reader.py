"""Reader: runs batches of prompts and reads what the model computes at some places."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nnsight import NNsight, errors

from ._corpus import Prompt
from ._places import Place


class Column(NamedTuple):
    """One place's values: its key, axes, the shape of one row, and dtype."""

    key: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class Reader:
    """Runs batches of prompts and reads some places, in the order in which the model computes them.

    Args:
        model: The model.
        places: What to read.
        ids: Token ids of any prompt, to find out about the places.
    """

    def __init__(self, model: NNsight, places: Sequence[Place], ids: Sequence[int]) -> None:
        self._model = model
        accepted = inspect.signature(type(model._model).forward).parameters
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        self._places = [places[i] for i in _order(model, places, torch.tensor([ids[:1]]))]
        self._copied: set[str] = set()  # keys of places that the model changes in place after they were read
        tiled = list(ids) * 7
        values = self._read(torch.tensor([tiled[:5]] * 3))
        other = self._read(torch.tensor([tiled[:7]] * 2))
        for place in self._places:
            _check(place, values[place.key], (3, 5))
            _check(place, other[place.key], (2, 7))
        self.columns = [
            Column(place.key, place.axes, tuple(values[place.key].shape[2:]), values[place.key].dtype)
            for place in self._places
        ]
        self.pads_left = self._padding(tiled) if hasattr(model, "tokenizer") else None

    def row_bytes(self, dtype: torch.dtype | None) -> int:
        """Bytes of one row of all places."""
        return sum(math.prod(column.shape) * (dtype or column.dtype).itemsize for column in self.columns)

    def read(self, batch: Sequence[Prompt]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The values `[row, …]` at the positions chosen, and for each row the number of its prompt in the batch."""
        lengths = [len(prompt.ids) for prompt in batch]
        longest = max(lengths)
        if min(lengths) == longest:
            values = self._read(torch.tensor([prompt.ids for prompt in batch]))
        else:
            values = self._read([prompt.ids for prompt in batch])
        rows, places = [], []
        for i, prompt in enumerate(batch):
            shift = i * longest + (longest - lengths[i] if self.pads_left else 0)
            rows += [i] * len(prompt.chosen)
            places += [shift + position for position in prompt.chosen]
        index = torch.tensor(places)
        found = {}
        for place in self._places:
            value = values[place.key]
            _check(place, value, (len(batch), longest))
            found[place.key] = value.flatten(0, 1).index_select(0, index.to(value.device))
        return found, torch.tensor(rows)

    def _read(self, inputs: Any) -> dict[str, Any]:
        values, versions = {}, {}
        with torch.no_grad(), self._model.trace(inputs, **self._options) as tracer:
            for place in self._places:
                value = place.read()
                values[place.key] = value.clone() if place.key in self._copied else value
                versions[place.key] = getattr(values[place.key], "_version", 0)
            tracer.stop()
        changed = {key for key, version in versions.items() if getattr(values[key], "_version", 0) != version}
        self._copied |= changed
        return self._read(inputs) if changed else values

    def _padding(self, ids: Sequence[int]) -> bool | None:
        """Whether short prompts are padded on the left, None where the model does not say."""
        given: dict[str, Any] = {}
        with torch.no_grad(), self._model.trace([list(ids[:3]), list(ids[:2])], **self._options) as tracer:
            given.update(self._model.inputs[1])
            tracer.stop()
        mask = given.get("attention_mask")
        if mask is None or mask.shape != (2, 3) or mask.all():
            return None
        return not bool(mask[1, 0])


def _order(model: NNsight, places: Sequence[Place], ids: torch.Tensor) -> list[int]:
    """The numbers of the places in the order in which the model comes by them."""
    order: list[int] = []
    with torch.no_grad(), model.trace(ids) as tracer:
        for number, place in enumerate(places):
            with tracer.invoke():
                place.read()
                order.append(number)
    return order


def _check(place: Place, value: Any, expected: tuple[int, int]) -> None:
    if not isinstance(value, torch.Tensor) or value.dim() < 3 or tuple(value.shape[:2]) != expected:
        shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise errors.RowsError(
            f"{place.key} is {shape} for {expected[0]} prompts of {expected[1]} tokens; a store holds values [batch, pos, …]. "
            'Choose a place that has them, such as "resid_pre[3]" or "head_z[3]".'
        )
