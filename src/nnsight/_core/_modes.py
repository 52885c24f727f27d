"""PyTorch's thread-local modes, kept apart for the body and the model.

Grad mode, inference mode, autocast and function modes belong to the thread; two coroutines of one thread
would leak them into each other at every switch.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from ._tensors import tensors_in

_is_grad_enabled = torch._C.is_grad_enabled if hasattr(torch._C, "is_grad_enabled") else torch.is_grad_enabled
_set_grad_enabled = torch._C._set_grad_enabled
_is_inference = torch._C.is_inference_mode_enabled
_is_autocast = torch._C._is_any_autocast_enabled
_count_function_modes = torch._C._len_torch_function_stack
_AUTOCAST_DEVICES = ("cpu", "cuda")


class Modes(NamedTuple):
    """The modes one side had when it was left; `rare` is None while only grad mode is in play."""

    grad: bool
    rare: Rare | None


class Rare(NamedTuple):
    """The modes that are seldom on: inference, autocast, function modes (a `torch.device` block)."""

    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    function_modes: tuple[Any, ...]


_PLAIN = Modes(True, None), Modes(False, None)


def plain_modes(*function_modes: Any) -> Modes:
    """No gradients, and nothing else but these function modes."""
    return Modes(False, _OFF._replace(function_modes=function_modes)) if function_modes else _PLAIN[1]


def capture_modes() -> Modes:
    """The modes of this thread as they are now."""
    if _is_inference() or _is_autocast() or _count_function_modes():
        return Modes(_is_grad_enabled(), _capture_rare())
    return _PLAIN[not _is_grad_enabled()]


class _OnInferenceTensors(TorchFunctionMode):
    """Operations on inference tensors run in inference mode, outside which they cannot be changed."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(tensor.is_inference() for tensor in tensors_in((args, kwargs))):
            with torch.inference_mode():
                return function(*args, **kwargs)
        return function(*args, **kwargs)


_LOAN = _OnInferenceTensors()


def lend_inference(modes: Modes) -> Modes:
    """`modes` of a body that holds inference tensors of a model: it may change them, and is otherwise its own."""
    rare = modes.rare or _OFF
    return Modes(modes.grad, rare._replace(function_modes=(_LOAN, *rare.function_modes)))


def end_loan(modes: Modes) -> Modes:
    """`modes` before `lend_inference`."""
    rare = modes.rare or _OFF
    others = list(rare.function_modes)
    if _LOAN in others:
        others.remove(_LOAN)
    rare = rare._replace(function_modes=tuple(others))
    return _PLAIN[not modes.grad] if rare == _OFF else Modes(modes.grad, rare)


def is_inference(modes: Modes) -> bool:
    """Whether inference mode is on in `modes`."""
    return modes.rare is not None and modes.rare.inference


def switch_modes(before: Modes, after: Modes) -> None:
    """Go from `before`, the modes that hold now, to `after`."""
    if before is after:
        return
    if before.rare is not None or after.rare is not None:
        _restore_rare(after.rare or _OFF)
    _set_grad_enabled(after.grad)


def _capture_rare() -> Rare:
    autocast = tuple(
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _AUTOCAST_DEVICES
    )
    return Rare(_is_inference(), autocast, torch.is_autocast_cache_enabled(), _function_modes())


_OFF = Rare(False, (("cpu", False, torch.bfloat16), ("cuda", False, torch.float16)), True, ())


def _function_modes() -> tuple[Any, ...]:
    return tuple(torch._C._get_function_stack_at(i) for i in range(_count_function_modes()))


def _restore_rare(target: Rare) -> None:
    if _is_inference() != target.inference:
        _force_inference(target.inference)
    for device, enabled, dtype in target.autocast:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(target.autocast_cache)
    if _function_modes() != target.function_modes:
        while _count_function_modes():
            torch._C._pop_torch_function_stack()
        for mode in target.function_modes:
            torch._C._push_on_torch_function_stack(mode)


def _force_inference(enabled: bool) -> None:
    # Torch only has a guard that undoes itself when it goes, in the thread where it goes: let it go in another.
    guards = [torch._C._InferenceMode(enabled)]
    thread = threading.Thread(target=guards.clear)
    thread.start()
    thread.join()
