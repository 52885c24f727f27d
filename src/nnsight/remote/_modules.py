"""torch.nn.Modules in a job: their attributes go by value, and what would be another thing there is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..errors import TravelError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_module(module: Module, name: str) -> None:
    """Refuse what a module has beside its attributes.

    Args:
        module: The module, whose children are checked when their turn comes.
        name: What it is called, for the error.

    Raises:
        TravelError: It has such a thing.
    """
    reason = next(filter(None, _reasons_of_tensors(module)), None) or _reason(module)
    if reason is not None:
        raise TravelError(f"{name} cannot travel: {reason}")


def _reason(module: Module) -> str | None:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule, whose code is TorchScript's. Send the module that it was made from."
    if kind.__module__.startswith("torch._dynamo") or vars(module).get("_compiled_call_impl") is not None:
        return "it was compiled. Send the module that was given to torch.compile, or make it without `.compile()`."
    if is_parametrized(module):
        of = ", ".join(sorted(module.parametrizations))  # pyright: ignore[reportArgumentType]
        return (
            f"its {of} is computed by a parametrization. torch.nn.utils.parametrize.remove_parametrizations puts the "
            "value in its place; or send a plain module with the value (`plain.weight.data = module.weight.detach()`)."
        )
    if any(vars(module).get(hooks) for hooks in _HOOKS):
        return (
            f"there are hooks on this {kind.__qualname__}, and hooks stay here. Remove them (`handle.remove()`, or what "
            "undoes weight_norm and prune), or do in its `forward` what they do."
        )
    return None


def _reasons_of_tensors(module: Module) -> Iterable[str | None]:
    for name, tensor in _tensors(module):
        if is_lazy(tensor):
            yield f"its {name} has no numbers before its first call. Call it once, or give it its sizes."
        elif type(tensor) not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
            yield f"its {name} is a {type(tensor).__qualname__}, which is more than numbers. Send it dequantized, as a tensor."
        elif tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            yield f"there are hooks on its {name}, and hooks stay here. Remove them (`handle.remove()`)."


def _tensors(module: Module) -> list[tuple[str, torch.Tensor]]:
    found = [*module._parameters.items(), *module._buffers.items()]
    return [(name, tensor) for name, tensor in found if tensor is not None]


class _Place(NamedTuple):
    start: int
    end: int
    tensor: torch.Tensor
    name: str


class Memory:
    """Where in memory the tensors of a job's modules lie: what arrives as two tensors must be two here."""

    def __init__(self) -> None:
        self._places: dict[tuple[torch.device, int], list[_Place]] = {}

    def add(self, module: Module, name: str) -> None:
        """Note the tensors of a module.

        Raises:
            TravelError: One has numbers of another one, without being the same tensor.
        """
        for own, tensor in _tensors(module):
            if isinstance(tensor, FakeTensor) or tensor.is_meta or not tensor.numel():
                continue
            storage = tensor.device, tensor.untyped_storage().data_ptr()
            start = int(tensor.storage_offset()) * tensor.element_size()
            length = sum((size - 1) * abs(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            place = _Place(start, start + length * tensor.element_size(), tensor, f"{own} of {name}")
            for other in self._places.setdefault(storage, []):
                if other.tensor is not tensor and other.start < place.end and place.start < other.end:
                    raise TravelError(
                        f"{name} cannot travel: {place.name} and {other.name} are two tensors with the same numbers in "
                        "memory, and would be apart there. Make them one (`self.b = self.a`, and `self.a.T` where it is "
                        "used), or give one numbers of its own (`.clone()`)."
                    )
            self._places[storage].append(place)
