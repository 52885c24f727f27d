"""Values: what modules and operations have in common, their input and output."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, TypeVar

import torch

from nnsight._core import INPUT, OUTPUT, active

from ..errors import InputError
from ._tree import Tree, as_inputs, first_input, with_first_input

Kind = TypeVar("Kind", bound="Values")


def _writer() -> FrameType:
    """The frame of the line that assigns: an envoy's own `__setattr__` may stand between."""
    frame = sys._getframe(2)
    return frame.f_back or frame if frame.f_code.co_name == "__setattr__" else frame


class Values:
    """The values of one place of the model: a module, or an operation inside a module's forward."""

    _place: Any
    _path: str
    _tree: Tree

    @property
    def output(self) -> Any:
        """What the module or operation returns; waits until it has run.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4)))
            >>> with model.trace(torch.ones(1, 3)):
            ...     hidden = model[0].output.save()

        Raises:
            NotTracingError: Outside a trace.
            OutOfOrderError: It has already run, and a second pass cannot serve the read.
            NeverRanError: It does not run in this forward.
        """
        tree, place = self._tree, self._place
        worker = active.get()
        if worker is None or worker.instruments is not tree.instruments:
            worker = tree.worker(self._path, OUTPUT)
        if tree.before_request is not None:
            tree.before_request(worker, place, self._path)
        visit, value = worker.run.read(worker, place, OUTPUT, self._path)
        if type(value) is torch.Tensor and tree.plain_tensors:
            return value
        return tree.show(worker, visit, place, self._path, value)

    @output.setter
    def output(self, value: Any) -> None:
        self._tree.write(self._place, self._path, OUTPUT, value, _writer())

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What it is called with: `(args, kwargs)`; waits until it is called.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4)))
            >>> with model.trace(torch.ones(1, 3)):
            ...     args, kwargs = model[0].inputs
            ...     model[0].inputs = (args[0] * 2,), kwargs

        Raises:
            EditError: Something else than a pair of this form is assigned.
        """
        tree, place = self._tree, self._place
        worker = tree.worker(self._path, INPUT)
        if tree.before_request is not None:
            tree.before_request(worker, place, self._path)
        return worker.run.read(worker, place, INPUT, self._path)[1]

    @inputs.setter
    def inputs(self, value: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        self._tree.write(self._place, self._path, INPUT, as_inputs(value, self._path), _writer())

    @property
    def input(self) -> Any:
        """The first argument it is called with; waits until it is called.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4)))
            >>> with model.trace(torch.ones(1, 3)):
            ...     model[0].input = model[0].input * 2
        """
        return first_input(self.inputs, self._path)

    @input.setter
    def input(self, value: Any) -> None:
        tree, place = self._tree, self._place
        worker = tree.worker(self._path, INPUT)
        if tree.before_request is not None:
            tree.before_request(worker, place, self._path)
        visit = worker.run.reach(worker, place, INPUT, self._path, write=True)
        worker.run.change(worker, visit, with_first_input(visit, value), f"{self._path}.input")

    @property
    def path(self) -> str:
        """Where it is in the model.

        Example:
            >>> from nnsight import LanguageModel
            >>> LanguageModel("nnsight/landmarks").transformer.h[3].path
            'model.transformer.h.3'
        """
        return self._path

    def next(self: Kind, count: int = 1) -> Kind:
        """Go on to a later call: what the block asks of this place from here on is of its next call.

        A module that is called several times in a forward, or stands at several places of the model, has one sequence
        of calls, counted anew in every step of a generation; each block of a trace counts for itself.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> relu = torch.nn.ReLU()
            >>> model = NNsight(torch.nn.Sequential(relu, torch.nn.Linear(3, 3), relu))
            >>> with model.trace(torch.ones(1, 3)):
            ...     first = model[0].output.save()
            ...     last = model[0].next().output.save()
            >>> torch.equal(last, model(torch.ones(1, 3)))
            True

        Args:
            count: How many calls to go on.

        Returns:
            This envoy or operation.

        Raises:
            NotTracingError: Outside a trace.
            InputError: `count` is less than one.
        """
        if not isinstance(count, int) or count < 1:
            raise InputError(f"{self._path}.next({count!r}): calls are counted forwards, by at least one.")
        worker = self._tree.worker(self._path, "next()")
        calls = worker.calls = worker.calls or {}
        calls[self._place] = calls.get(self._place, 0) + count
        worker.run.lone = False
        return self

    def skip(self, value: Any) -> None:
        """Do not run it: let `value` be what it returns.

        Nothing inside it runs either, so asking for a value there is a `NeverRanError`.  For a block of a
        Hugging Face model `value` is the hidden states, or a tuple that begins with them.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)))
            >>> with model.trace(torch.ones(1, 3)):
            ...     first = model[0].output.save()
            ...     model[1].skip(first)
            ...     last = model.output.save()
            >>> torch.equal(first, last)
            True

        Args:
            value: What stands for the output: a tensor, or a tuple as the module itself returns it.

        Raises:
            OutOfOrderError: It has been called already.
            NeverRanError: It is not called in this forward.
            RowsError: In a batch, the block that skips sees a part of the rows only.
        """
        tree, place = self._tree, self._place
        worker = tree.worker(self._path, OUTPUT)
        if tree.before_request is not None:
            tree.before_request(worker, place, self._path)
        if tree.stand_in is not None:
            value = tree.stand_in(place, value)
        worker.run.skip(worker, place, self._path, value)
