"""Aliases: tensors that stand for one of the model's own, to which their gradients belong.

A block may be shown another tensor than the one the model goes on with, sharing its storage: the rows of one invoke,
or a block's output that also answers as a tuple.  Gradients arrive at the model's tensor only, so whatever is asked of an
alias about them is asked of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, SupportsIndex, TypeVar, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import EditError

_Shown = TypeVar("_Shown", bound="Alias")


class Alias(torch.Tensor):
    """A view of `_held`, a tensor of the model or an alias of one; what is computed from it is a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    _held: torch.Tensor

    @property
    def grad(self) -> torch.Tensor | None:
        return self._held.grad

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._held.grad = value

    @property
    def requires_grad(self) -> bool:
        return _grad_fn(self) is not None  # what is computed from it has a gradient

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value != self.requires_grad:
            self.requires_grad_(value)

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        return self._held.grad_fn

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        return self._held.is_leaf

    @property
    def retains_grad(self) -> bool:  # type: ignore[override]
        return self._held.retains_grad

    def requires_grad_(self, requires_grad: bool = True) -> Any:  # type: ignore[override]
        self._held.requires_grad_(requires_grad)
        if self._held.requires_grad != (_grad_fn(self) is not None):
            torch._C._swap_tensor_impl(self, self._view())  # a view made before is no part of the graph
        return self

    def retain_grad(self) -> None:
        self._held.retain_grad()

    def register_hook(self, hook: Callable[[torch.Tensor], Any]) -> Any:
        return self._held.register_hook(hook)

    def _view(self) -> torch.Tensor:
        return _as_class(self._held, type(self))

    def _part(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of a gradient of `_held` that is this tensor's."""
        return whole

    def _as_native(self) -> torch.Tensor:
        held = self._held
        return held._as_native() if isinstance(held, Alias) else held

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self._as_native().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self._as_native().__deepcopy__(memo)


class RowsTensor(Alias):
    """Some rows of a tensor of the model; `_where` they are in `_held`, as `narrow` takes it."""

    _where: tuple[int, int, int]
    _alone: torch.Tensor | None = None

    @property
    def grad(self) -> torch.Tensor | None:
        whole = self._held.grad
        return None if whole is None else whole.narrow(*self._where)

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        whole = self._held.grad
        if value is None and whole is None:
            return
        if value is not None:
            check_gradient(self, value)
        changed = torch.zeros_like(self._held) if whole is None else whole.clone()
        changed.narrow(*self._where).copy_(torch.zeros(()) if value is None else value)
        self._held.grad = changed  # the other rows keep theirs

    @property
    def grad_fn(self) -> Any:
        return _grad_fn(self)

    def register_hook(self, hook: Callable[[torch.Tensor], Any]) -> Any:
        def on_rows(whole: torch.Tensor) -> torch.Tensor | None:
            changed = hook(whole.narrow(*self._where))
            if changed is None:
                return None
            result = whole.clone()
            result.narrow(*self._where).copy_(changed)
            return result

        return self._held.register_hook(on_rows)

    def _view(self) -> torch.Tensor:
        return _as_class(self._held.narrow(*self._where), type(self))

    def _part(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.narrow(*self._where)

    def _as_native(self) -> torch.Tensor:
        if self._alone is None:
            self._alone = self._held.narrow(*self._where)
        return self._alone


class FakeRowsTensor(RowsTensor, FakeTensor):  # type: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """The same in a scan."""


def rows_of(tensor: torch.Tensor, dim: int, start: int, size: int, source: torch.Tensor, at: int) -> torch.Tensor:
    """Part of `tensor` as a view, with the gradients that arrive at `source` from `at` on where there can be any."""
    part = tensor.narrow(dim, start, size)
    if not (tensor.requires_grad or torch.is_grad_enabled()) or not _may_have_gradients(tensor):
        return part
    shown = cast(RowsTensor, _as_class(part, FakeRowsTensor if isinstance(tensor, FakeTensor) else RowsTensor))
    shown._held = source
    shown._where = dim, at, size
    return shown


def show_as(held: torch.Tensor, kind: type[_Shown], fake: type[_Shown]) -> _Shown:
    """`held` as an alias of class `kind`, or in a scan of class `fake`."""
    shown = cast(_Shown, _as_class(held, fake if isinstance(held, FakeTensor) else kind))
    shown._held = held
    return shown


def source_of_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at which the gradients of `tensor` arrive."""
    while isinstance(tensor, Alias):
        tensor = tensor._held
    return tensor


def own_part(tensor: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Of the gradient that arrives there, what belongs to `tensor`."""
    if gradient is None or not isinstance(tensor, Alias):
        return gradient
    held = own_part(tensor._held, gradient)
    return None if held is None else tensor._part(held)


def check_gradient(tensor: torch.Tensor, value: Any) -> None:
    """Refuse what cannot be the gradient of `tensor`."""
    if not isinstance(value, torch.Tensor):
        raise EditError(
            f"A gradient is a tensor, not {value!r}: write `tensor.grad = torch.zeros_like(tensor)`, or "
            "`tensor.grad[:] = 0`."
        )
    for name in ("shape", "dtype", "device"):
        given, wanted = getattr(value, name), getattr(tensor, name)
        if given != wanted:
            raise EditError(f"A gradient has the {name} of its tensor, {wanted}: it cannot be one of {name} {given}.")


def _may_have_gradients(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_inference():
        return False
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) or isinstance(tensor, (Alias, FakeTensor))


def _grad_fn(tensor: torch.Tensor) -> Any:
    return torch.Tensor.grad_fn.__get__(tensor)  # type: ignore[attr-defined]


def _as_class(tensor: torch.Tensor, kind: type[torch.Tensor]) -> torch.Tensor:
    if not isinstance(tensor, FakeTensor):
        return tensor.as_subclass(kind)
    shown = torch.ops.aten.alias(tensor)
    shown.__class__ = kind  # a tensor made by a mode cannot be made again as another class
    return shown
