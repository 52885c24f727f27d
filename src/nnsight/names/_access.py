"""Access: how one name of the vocabulary is read and written, at each layer of a stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from .._core import INPUT, OUTPUT, OperationPlace, Run, Visit, Worker
from ..errors import NamesError
from ._family import Attention, Spot
from ._overrides import show_apart, show_results
from ._shapes import AsItIs, InRows, Shape, fit
from ._window import Window, open_window

if TYPE_CHECKING:
    from ._stack import Stack

_PLAIN = AsItIs()


class Access:
    """A name whose value is the input or output of a module of each layer, or a part of it.

    A `held` one is a tensor that the layer goes on using beside the module it is given to: it is changed in place.
    """

    def __init__(
        self, stack: Stack, name: str, spot: Spot, shape: Shape = _PLAIN, *, held: bool = False, flat: bool = False
    ) -> None:
        self.stack = stack
        self.name = name
        self.kind = spot.kind
        self._spot = spot
        self._shape = shape
        self._held = held
        self._flat = flat
        self._steps = tuple(spot.path.split(".")) if spot.path else ()

    def path(self, index: int) -> str:
        """Where the value is: `model.transformer.h.3.mlp`."""
        below = f".{self._spot.path}" if self._spot.path else ""
        return f"{self.stack.path}.{index}{below}"

    def module(self, index: int) -> Module:
        """The module of layer `index` that the value belongs to."""
        return self.stack.module(index, self._steps, self.name)

    def read(self, worker: Worker, index: int) -> torch.Tensor:
        """The value at layer `index`, as the vocabulary shows it."""
        run = worker.run
        place, path = self._locate(run, index), self.path(index)
        visit, value = run.read(worker, place, self.kind, path, held=self._held)
        shown = self._shape_at(run, visit, index).show(self._pick(value))
        if self._held and visit.kind == OUTPUT:
            shown = shown.clone()  # the module has used it: changing it now would change half of what follows
            run.edits.note_copy(path, shown, value)
        return shown

    def write(self, worker: Worker, index: int, new: Any) -> None:
        """Put `new` there."""
        run = worker.run
        place, path = self._locate(run, index), self.path(index)
        visit = run.reach(worker, place, self.kind, path, write=True)
        _, value = run.read(worker, place, self.kind, path, held=self._held)
        tensor, shape = self._pick(value), self._shape_at(run, visit, index)
        shown = shape.show(tensor)
        fitted = fit(new, shown, f"{self.stack.prefix}{self.name}[{index}]")
        if self._held:
            shown.copy_(fitted)
            return
        changed = self._replaced(visit.value, shape.take(tensor, fitted))
        run.change(worker, visit, changed, f"{path}.{self.kind}")

    def _locate(self, _run: Run, index: int) -> Any:
        return self.module(index)

    def _shape_at(self, run: Run, visit: Visit, index: int) -> Shape:
        if not self._flat:
            return self._shape
        given = run.arguments_of(visit, self.stack.layer(index))
        if given is None:
            raise NamesError(f"{self.path(index)}: the positions of {self.name} cannot be told apart here.")
        args, kwargs = given
        hidden = args[0] if args else next(iter(kwargs.values()))
        return InRows(hidden.shape[1])

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
    """A name whose value appears at a place of its own, alone, with the batch in front."""

    def __init__(self, stack: Stack, name: str, spot: Spot, shape: Shape = _PLAIN, *, flat: bool = False) -> None:
        super().__init__(stack, name, spot, shape, flat=flat)
        self.kind = OUTPUT

    def _locate(self, run: Run, index: int) -> Any:
        place = self.stack.place(self.module(index), self.name)
        run.start().see().watch(place)
        self._show(run, index, place)
        return place

    def _show(self, run: Run, index: int, place: OperationPlace) -> None:
        show_apart(run.overrides, place, self._spot.kind)

    def _pick(self, value: Any) -> torch.Tensor:
        return value

    def _replaced(self, _value: Any, new: torch.Tensor) -> Any:
        return new


class _InAttention(Access):
    """A name of an attention: once it is asked for, another one of the same layer is still in view."""

    _row: Attention

    def of(self, row: Attention) -> Any:
        """This access, as that of an attention."""
        self._row = row
        self._forward = tuple(row.module.split("."))
        self._prepared = row.operations()
        return self

    def _open(self, run: Run, index: int) -> Window:
        window = open_window(run, self.stack.module(index, self._forward, self.name))
        for operation in self._prepared:
            window.prepare(operation)
        return window


class OfHeads(_InAttention):
    """The input or output of one of the attention's projections."""

    def _locate(self, run: Run, index: int) -> Any:
        if self._prepared:
            self._open(run, index)
        return self.module(index)


class _ShownInAttention(_InAttention, Shown):
    def path(self, index: int) -> str:
        return f"{self.stack.path}.{index}.{self._row.module}.{self._spot.path}"

    def module(self, index: int) -> Module:
        return self.stack.module(index, self._forward, self.name)


class Operation(_ShownInAttention):
    """What an operation of the attention's forward is given, or gives."""

    def _show(self, run: Run, index: int, place: OperationPlace) -> None:
        self._open(run, index).show(self._spot.path, self._spot.kind, self._spot.item, place)


class Pattern(_ShownInAttention):
    """The probabilities; the layer computes its attention eagerly once they are asked for."""

    def _show(self, run: Run, index: int, place: OperationPlace) -> None:
        self._open(run, index).show_pattern(self._spot.path, place)


class Result(_InAttention, Shown):
    """What each head adds to the attention's output."""

    def path(self, index: int) -> str:
        return f"{self.stack.path}.{index}.{self._row.out}.result"

    def _show(self, run: Run, index: int, place: OperationPlace) -> None:
        if self._prepared:
            self._open(run, index)
        show_results(run.overrides, place, self.stack.count(self._row.heads))


class Whole(Access):
    """A name that the model has once."""

    def __init__(
        self, stack: Stack, name: str, module: str, attribute: str | None = None, *, kind: str = OUTPUT
    ) -> None:
        super().__init__(stack, name, Spot(module, kind, 0, False))
        self._attribute = attribute

    def path(self, index: int) -> str:
        return f"model.{self._spot.path}".rstrip(".")

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
