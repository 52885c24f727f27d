"""Access: how one name of the vocabulary is read and written, at each layer of a stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from .._core import INPUT, OUTPUT, OperationPlace, Run, Worker, current_pass
from ..errors import NamesError
from ._family import Attention, Spot
from ._ports import Keep, Showing, open_port
from ._shapes import AsItIs, InRows, Shape, fit
from ._terms import LAYER
from ._window import Window, open_window

if TYPE_CHECKING:
    from ._stack import Stack

_RANKS = {name: rank for rank, name in enumerate(LAYER)}
_PLAIN = AsItIs()


class Access:
    """A name whose value is the input or output of a module of each layer."""

    def __init__(self, stack: Stack, name: str, spot: Spot) -> None:
        self.stack = stack
        self.name = name
        self.kind = spot.kind
        self._spot = spot
        self._steps = tuple(spot.path.split(".")) if spot.path else ()

    def path(self, index: int) -> str:
        """Where the value is: `model.transformer.h.3.mlp`."""
        below = f".{self._spot.path}" if self._spot.path else ""
        return f"{self.stack.path}.{index}{below}"

    def where(self, index: int) -> str:
        """The path with what is read there: `model.transformer.h.3.mlp.output`."""
        return f"{self.path(index)}.{self._spot.kind}"

    def module(self, index: int) -> Module:
        """The module of layer `index` that the value belongs to."""
        return self.stack.module(index, self._steps, self.name)

    def read(self, worker: Worker, index: int) -> torch.Tensor:
        """The value at layer `index`."""
        run = worker.run
        place = self._locate(run, index)
        return self._pick(run.read(worker, place, self.kind, self._label(place, index))[1])

    def write(self, worker: Worker, index: int, new: Any) -> None:
        """Put `new` there."""
        run = worker.run
        place = self._locate(run, index)
        path = self._label(place, index)
        visit = run.reach(worker, place, self.kind, path, write=True)
        tensor = self._pick(run.read(worker, place, self.kind, path)[1])
        fitted = fit(new, tensor, self.stack.spelled(self.name, index))
        run.change(worker, visit, self._replaced(visit.value, fitted), path)

    def _locate(self, _run: Run, index: int) -> Any:
        return self.module(index)

    def _label(self, _place: Any, index: int) -> str:
        return self.path(index)

    def _pick(self, value: Any) -> torch.Tensor:
        item = self._spot.item
        if self.kind == INPUT:
            args, kwargs = value
            return args[item] if len(args) > item else list(kwargs.values())[item - len(args)]
        return value[item] if isinstance(value, tuple) else value

    def _replaced(self, value: Any, new: torch.Tensor) -> Any:
        item = self._spot.item
        if self.kind == INPUT:
            args, kwargs = value
            if len(args) > item:
                return (*args[:item], new, *args[item + 1 :]), kwargs
            return args, {**kwargs, list(kwargs)[item - len(args)]: new}
        return (*value[:item], new, *value[item + 1 :]) if isinstance(value, tuple) else new


class Shown(Access):
    """A name whose value appears at a place of its own, in a shape of its own, with the batch in front."""

    def __init__(
        self, stack: Stack, name: str, spot: Spot, shape: Shape = _PLAIN, *, keep: Keep = "shared", flat: bool = False
    ) -> None:
        super().__init__(stack, name, spot)
        self.kind = OUTPUT
        self._shape = shape
        self._keep: Keep = keep
        self._flat = flat

    def _locate(self, run: Run, index: int) -> Any:
        place = self.stack.place(self.module(index), self.name, index)
        run.start().see().watch(place)
        self._show(run, index, place)
        return place

    def _label(self, place: OperationPlace, index: int) -> str:
        return place.name

    def _show(self, run: Run, index: int, place: OperationPlace) -> None:
        shape = _Flat(self.stack.layer(index)) if self._flat else self._shape
        showing = Showing(place, shape, self._keep, _RANKS.get(self.name, 0))
        open_port(run.overrides, place.owner).show(self._spot.kind, showing)

    def _pick(self, value: Any) -> torch.Tensor:
        return value

    def _replaced(self, value: Any, new: torch.Tensor) -> Any:
        return new


class _Flat:
    """`[batch * pos, d]` as `[batch, pos, d]`, with the positions that the layer was called with."""

    def __init__(self, layer: Module) -> None:
        self._layer = layer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Flat) and other._layer is self._layer

    def __hash__(self) -> int:
        return hash(self._layer)

    def show(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._rows().show(tensor)

    def take(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return new.flatten(0, 1)

    def _rows(self) -> InRows:
        current = current_pass()
        given = current.arguments_of(self._layer) if current is not None else None
        if given is None:
            raise NamesError("The positions of an MLP's values are not known outside of its layer.")
        args, kwargs = given
        return InRows((args[0] if args else next(iter(kwargs.values()))).shape[1])


class InAttention(Shown):
    """A name of an attention: once it is asked for, another one of the same layer is still in view."""

    def __init__(
        self, stack: Stack, name: str, row: Attention, spot: Spot, shape: Shape = _PLAIN, *, keep: Keep = "shared"
    ) -> None:
        super().__init__(stack, name, spot, shape, keep=keep)
        self._row = row
        self._forward = tuple(row.module.split("."))
        self._prepared = row.operations()

    def _show(self, run: Run, index: int, place: OperationPlace) -> None:
        if self._prepared:
            self._open(run, index)
        super()._show(run, index, place)

    def _open(self, run: Run, index: int) -> Window:
        window = open_window(run, self.stack.module(index, self._forward, self.name))
        for operation in self._prepared:
            window.prepare(operation)
        return window


class Operation(InAttention):
    """What an operation of the attention's forward is given, or gives."""

    def path(self, index: int) -> str:
        return f"{self.stack.path}.{index}.{self._row.module}.source.{self._spot.path}"

    def module(self, index: int) -> Module:
        return self.stack.module(index, self._forward, self.name)

    def _show(self, run: Run, index: int, place: OperationPlace) -> None:
        showing = Showing(place, self._shape, self._keep, 0)
        self._open(run, index).show(self._spot.path, self._spot.kind, self._spot.item, showing)


class Pattern(Operation):
    """The probabilities; the layer computes its attention eagerly once they are asked for."""

    def where(self, index: int) -> str:
        return f"{self.stack.path}.{index}.{self._row.module}.pattern"

    def _show(self, run: Run, index: int, place: OperationPlace) -> None:
        self._open(run, index).show_pattern(self._spot.path, place)


class Result(InAttention):
    """What each head adds to the attention's output."""

    def where(self, index: int) -> str:
        return f"{self.path(index)}.result"

    def _show(self, run: Run, index: int, place: OperationPlace) -> None:
        if self._prepared:
            self._open(run, index)
        open_port(run.overrides, place.owner).show_results(place, self.stack.count(self._row.heads))


class Whole(Access):
    """A name that the model has once."""

    def __init__(
        self, stack: Stack, name: str, module: str, attribute: str | None = None, *, kind: str = OUTPUT
    ) -> None:
        super().__init__(stack, name, Spot(module, kind, 0, False))
        self._attribute = attribute

    def path(self, index: int) -> str:
        return f"model.{self._spot.path}".rstrip(".")

    def where(self, index: int) -> str:
        return ".".join(filter(None, (super().where(index), self._attribute)))

    def module(self, index: int) -> Module:
        return self.stack.root_module(self._steps)

    def _pick(self, value: Any) -> torch.Tensor:
        if self._attribute is None:
            return super()._pick(value)
        found = value.get(self._attribute) if isinstance(value, dict) else None
        if found is None:
            raise NamesError(f"The output of this model, a {type(value).__name__}, has no {self._attribute}.")
        return found

    def _replaced(self, value: Any, new: torch.Tensor) -> Any:
        if self._attribute is None:
            return super()._replaced(value, new)
        return type(value)(**{**value, self._attribute: new})
