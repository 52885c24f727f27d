"""Fakes: a forward that computes shapes and dtypes only, whatever the module's weights are, or if they are there.

Every tensor that an operation of the model meets is taken by its shape: inputs, weights and buffers become fake
tensors on the way into the operation, so the module itself is not touched and other threads may use it.  A weight
that was never loaded (on the meta device) counts as one on `device`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorConverter,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode

from ..errors import ScanError
from ._tensors import map_tensors

_UNKNOWN_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
_META = torch.device("meta")


class Fakes:
    """One run's fake tensors: they can be combined with each other, and with real ones, in and after the run."""

    def __init__(self, describe: Callable[[Any], str], device: torch.device | None = None) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._mode.fake_tensor_converter = _Converter(device or torch.device("cpu"))
        self._describe = describe

    def of(self, value: Any) -> Any:
        """`value` with a fake tensor for each of its tensors, the same one for the same tensor."""
        return map_tensors(self._fake, value)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` with every operation in it computing shapes only."""
        args, kwargs = self.of(args), self.of(kwargs)
        with _OnFakes(self._mode, self._fake, self._describe):
            return function(*args, **kwargs)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._mode.from_tensor(tensor)


class _Converter(FakeTensorConverter):
    """Places meta tensors on a device, so that they can meet inputs that are on it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def from_real_tensor(self, fake_mode: FakeTensorMode, t: torch.Tensor, *args: Any, **kwargs: Any) -> FakeTensor:
        if t.device != _META:
            return super().from_real_tensor(fake_mode, t, *args, **kwargs)
        known = self._get_memo(t)
        if known is None:
            with torch.no_grad(), torch._C._DisableTorchDispatch():
                known = FakeTensor(fake_mode, t.detach(), self._device)
                known.requires_grad_(t.requires_grad)
            self.set_tensor_memo(t, known)
        return known


class _OnFakes(TorchFunctionMode):
    """Where it is on, operations take and give fake tensors.

    A function mode belongs to the side (model or body) that entered it; the dispatch mode that does the work
    is on only inside each operation, so it cannot leak where the model pauses.
    """

    def __init__(
        self, mode: FakeTensorMode, fake: Callable[[torch.Tensor], torch.Tensor], describe: Callable[[Any], str]
    ) -> None:
        super().__init__()
        self._mode = mode
        self._fake = fake
        self._describe = describe

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = self._take(args)
        kwargs = {name: self._take(value) for name, value in (kwargs or {}).items()}
        try:
            with self._mode:
                return function(*args, **kwargs)
        except _UNKNOWN_VALUES as error:
            running = getattr(getattr(getcurrent(), "serves", None), "running", ())
            where = self._describe(running[-1]) if running else "The model"
            raise ScanError(_DEPENDS.format(where=where, operation=getattr(error, "func", function))) from error

    def _take(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._fake(value)
        if type(value) is tuple or type(value) is list:
            return type(value)([self._take(item) for item in value])
        return value


_DEPENDS = """\
{where} calls {operation}, whose result depends on numbers, and a scan computes shapes only. Scan the part before it \
(read what you need, then tracer.stop()), or use trace()."""
