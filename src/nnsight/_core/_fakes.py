"""Fakes: a forward that computes shapes and dtypes only, with or without weights.

Every tensor that an operation of the model meets is taken by its shape: inputs, weights and buffers become
fake tensors on the way into the operation, so the module itself is not touched and other threads may use it.
A weight that was never loaded (on the meta device) counts as one on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorConverter,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode

from ..errors import ScanError
from ._coroutine import current_pass
from ._tensors import map_tensors, tensors_in

_UNKNOWN_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
_META = torch.device("meta")
_CPU = torch.device("cpu")


class Fakes:
    """The fake tensors of one run: they go with each other and with real ones, in the run and after it.

    `overrides` are forwards for modules whose own one needs numbers.
    """

    def __init__(self, describe: Callable[[Any], str], overrides: Mapping[Any, Any] = MappingProxyType({})) -> None:
        self.overrides = overrides
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._mode.fake_tensor_converter = _Converter()
        self._describe = describe

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function`, with every operation in it computing shapes only."""
        args, kwargs = map_tensors(self.of, args), map_tensors(self.of, kwargs)
        with _OnFakes(self, everywhere=True):
            return function(*args, **kwargs)

    def where_met(self) -> TorchFunctionMode:
        """A context in which real tensors that meet fake ones are taken by shape, and others stay real."""
        return _OnFakes(self, everywhere=False)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake tensor for a real one, the same each time."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.is_leaf:
            return self._mode.from_tensor(tensor)
        return self._mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)

    def compute(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation, on fake tensors."""
        try:
            with self._mode:
                return function(*self._take(args), **{name: self._take(value) for name, value in kwargs.items()})
        except _UNKNOWN_VALUES as error:
            current = current_pass()
            where = self._describe(current.running[-1]) if current and current.running else "The code"
            operation = getattr(error, "func", function)
            raise ScanError(_DEPENDS.format(where=where, operation=operation)) from error

    def _take(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.of(value)
        if type(value) is tuple or type(value) is list:
            return type(value)([self._take(item) for item in value])
        return value


class _Converter(FakeTensorConverter):
    """Takes what is on the meta device for something on the CPU, where it can meet inputs."""

    def from_real_tensor(self, fake_mode: FakeTensorMode, t: torch.Tensor, *args: Any, **kwargs: Any) -> FakeTensor:
        if t.device != _META:
            return super().from_real_tensor(fake_mode, t, *args, **kwargs)
        known = self._get_memo(t)
        if known is None:
            with torch.no_grad(), torch._C._DisableTorchDispatch():
                known = FakeTensor(fake_mode, t.detach(), _CPU)
                known.requires_grad_(t.requires_grad)
            self.set_tensor_memo(t, known)
        return known


class _OnFakes(TorchFunctionMode):
    """Where it is on, operations take and give fake tensors: all of them, or those that meet one.

    A function mode belongs to the side (model or body) that entered it; the dispatch mode that does the work
    is on only inside each operation, so it cannot leak where the model pauses.
    """

    def __init__(self, fakes: Fakes, *, everywhere: bool) -> None:
        super().__init__()
        self._fakes = fakes
        self._everywhere = everywhere

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._everywhere or any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs))):
            return self._fakes.compute(function, args, kwargs)
        return function(*args, **kwargs)


_DEPENDS = """\
{where} calls {operation}, whose result depends on numbers, and a scan computes shapes only. Scan the part \
before it (read what you need, then tracer.stop()), or use trace()."""
