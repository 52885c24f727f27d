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
_READS_NUMBERS = (torch.Tensor.tolist, torch.Tensor.numpy)
_FACTORIES = (torch.arange, torch.zeros, torch.ones, torch.full)
_MAKES_OF_NUMBERS = (torch.tensor, torch.as_tensor)
_META = torch.device("meta")
_CPU = torch.device("cpu")
_MOST = 2**20  # whole numbers whose values are kept


class Fakes:
    """The fake tensors of one run: they go with each other and with real ones, in the run and after it.

    `overrides` are forwards for modules whose own one needs numbers.
    """

    def __init__(self, describe: Callable[[Any], str], overrides: Mapping[Any, Any] = MappingProxyType({})) -> None:
        self.overrides = overrides
        self._mode = _Mode(allow_non_fake_inputs=True)
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
        if not tensor.is_leaf:
            return self._mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
        known = self._mode.fake_tensor_converter._get_memo(tensor)
        fake = self._mode.from_tensor(tensor)
        if known is None and self._mode.may_turn_const(tensor):
            # Token ids, masks and sizes of images keep their numbers: what is made of them alone may decide on shapes.
            self._note_numbers(fake, tensor.detach().clone())
        return fake

    def compute(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation, on fake tensors."""
        if function in _READS_NUMBERS:
            return function(self._numbers(function, args[0]))
        if function in _MAKES_OF_NUMBERS and args and isinstance(args[0], (list, tuple)):
            args = (map_tensors(lambda tensor: self._numbers(function, tensor).tolist(), args[0]), *args[1:])
        taken, named = self._take(args), {name: self._take(value) for name, value in kwargs.items()}
        try:
            with self._mode:
                made = function(*taken, **named)
        except _UNKNOWN_VALUES as error:
            raise self._error(getattr(error, "func", function)) from error
        if function in _FACTORIES and isinstance(made, FakeTensor) and not made.is_floating_point():
            with torch._C.DisableTorchFunction():
                numbers = function(*args, **kwargs)
            if self._mode.may_turn_const(numbers):
                self._note_numbers(made, numbers)
        return made

    def _note_numbers(self, fake: FakeTensor, numbers: torch.Tensor) -> None:
        fake.constant = numbers
        self._mode.fake_tensor_converter.add_constant_storage_mapping(fake)

    def _numbers(self, function: Callable[..., Any], tensor: torch.Tensor) -> torch.Tensor:
        known = getattr(self.of(tensor), "constant", None)
        if known is None:
            raise self._error(function.__name__)
        return known

    def _error(self, operation: Any) -> ScanError:
        current = current_pass()
        where = self._describe(current.running[-1]) if current and current.running else "The code"
        return ScanError(_DEPENDS.format(where=where, operation=operation))

    def _take(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.of(value)
        if type(value) is tuple or type(value) is list:
            return type(value)([self._take(item) for item in value])
        return value


class _Mode(FakeTensorMode):
    """Knows the numbers of whole-number tensors that are made of nothing but such, and of a single number of any kind."""

    def may_turn_const(self, t: torch.Tensor) -> bool:
        if super().may_turn_const(t):
            return True
        known = t.numel() <= _MOST and not (t.is_floating_point() or t.is_complex() or t.is_sparse)
        return known and not isinstance(t, FakeTensor) and t.device != _META


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
