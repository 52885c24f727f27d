"""Scan: a trace that computes shapes and dtypes only, with or without weights."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch._subclasses.fake_tensor import FakeTensor

from .._core import Call, Fakes, Override, path_of
from ._tracer import Tracer

_log = logging.getLogger("torch._subclasses.fake_tensor")


class ScanTracer(Tracer):
    """A trace in which every value is a fake tensor: shape, strides, dtype and device, no numbers.

    `overrides` replace forwards whose shapes would depend on values.
    """

    _overrides: Mapping[Module, Override] = {}

    def with_overrides(self, overrides: Mapping[Module, Override]) -> ScanTracer:
        """Use these forwards in place of the modules' own."""
        self._overrides = overrides
        return self

    def __enter__(self) -> ScanTracer:
        super().__enter__()
        assert self._run is not None
        self._run.overrides.update(self._overrides)
        self._attributes = Attributes(self._tree.root)
        _log.addFilter(_is_no_wrong_shape)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            return super().__exit__(kind, error, traceback)
        finally:
            _log.removeFilter(_is_no_wrong_shape)
            self._attributes.put_back()
            del self._attributes

    def _make_call(self) -> Call:
        run, call = self._run, super()._make_call()
        assert run is not None
        fakes, probe = Fakes(lambda place: path_of(run, place)), call.probe
        return Call(
            functools.partial(fakes.call, call.function),
            call.args,
            call.kwargs,
            repeatable=call.repeatable,
            probe=None if probe is None else lambda rows: functools.partial(fakes.call, probe(rows)),
            batch_first=call.batch_first,
            fake=True,
        )


def _is_no_wrong_shape(record: logging.LogRecord) -> bool:
    # PyTorch logs an operation that fails on fake tensors, with a traceback, besides raising the error.
    return not str(record.msg).startswith("failed while attempting to run meta")


class Attributes:
    """What the modules of a tree hold, to be put back: some forwards keep a table or a statistic."""

    def __init__(self, root: Module) -> None:
        self._before = [(held, dict(held)) for module in root.modules() for held in _holders(module)]
        self._gradients = [(parameter, parameter.grad) for parameter in root.parameters()]

    def put_back(self) -> None:
        """Undo every assignment since."""
        for held, before in self._before:
            changed = [name for name, value in held.items() if before.get(name, held) is not value]
            for name in {*changed, *(before.keys() - held.keys())} - {"forward"}:
                if name in before:
                    held[name] = before[name]
                else:
                    del held[name]
        for parameter, gradient in self._gradients:
            if isinstance(parameter.grad, FakeTensor):
                parameter.grad = gradient


def _holders(module: Module) -> tuple[dict[str, Any], dict[str, Tensor | None], dict[str, Any]]:
    return vars(module), module._buffers, module._parameters
