"""Scan: a trace that computes shapes and dtypes only, with or without weights."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from types import TracebackType

from torch.nn import Module

from .._core import Attributes, Call, Fakes, Override, path_of
from ._tracer import Tracer

_log = logging.getLogger("torch._subclasses.fake_tensor")


class ScanTracer(Tracer):
    """A trace in which the model's values are fake tensors: shape, strides, dtype and device, no numbers."""

    _computes = False
    _overrides: Mapping[Module, Override] = {}

    def with_overrides(self, overrides: Mapping[Module, Override]) -> ScanTracer:
        """Use these forwards in place of the modules' own, whose shapes depend on numbers."""
        self._overrides = overrides
        return self

    def __enter__(self) -> ScanTracer:
        super().__enter__()
        run = self._run
        assert run is not None
        run.overrides.update(self._overrides)
        self._fakes = run.fakes = Fakes(lambda place: path_of(run, place), self._overrides)
        self._attributes = Attributes(self._tree.root)
        _log.addFilter(_is_worth_logging)
        self._mode = self._fakes.where_met()
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._mode.__exit__(kind, error, traceback)
        try:
            return super().__exit__(kind, error, traceback)
        finally:
            _log.removeFilter(_is_worth_logging)
            self._attributes.put_back()
            del self._attributes, self._fakes, self._mode

    def _make_call(self) -> Call:
        call, fakes = super()._make_call(), self._fakes
        probe = call.probe
        return Call(
            functools.partial(fakes.call, call.function),
            call.args,
            call.kwargs,
            repeatable=call.repeatable,
            probe=None if probe is None else probe.through(fakes.call),
            batch_first=call.batch_first,
            fake=True,
        )


def _is_worth_logging(record: logging.LogRecord) -> bool:
    # An operation that fails on fake tensors raises an error; PyTorch logs it with a traceback besides.
    return not str(record.msg).startswith("failed while attempting to run meta")
