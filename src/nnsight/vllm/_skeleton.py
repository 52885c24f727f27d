"""Skeletons: the modules of a worker's model without their weights, for processes that run blocks of others.

A skeleton has the names, the classes' names, the containers and the plain attributes; what the worker alone has is
refused by name.
"""

from __future__ import annotations

from typing import Any, NoReturn

import msgspec
import torch
from torch.nn import Module, ModuleDict, ModuleList, Sequential

from ..errors import EngineError

_CONTAINERS: dict[str, type[Module]] = {kind.__name__: kind for kind in (ModuleList, ModuleDict, Sequential)}
_PLAIN = (bool, int, float, str)
_OWN = frozenset(dir(Module))


class ModuleInfo(msgspec.Struct, forbid_unknown_fields=True):
    """One module: its class's name, the container it is one of, children by their number, and what can be read of it."""

    kind: str
    container: str
    children: list[tuple[str, int]]
    plain: dict[str, bool | int | float | str]
    absent: list[str]
    text: str


def describe(root: Module) -> list[ModuleInfo]:
    """All modules of a model, in the order of `named_modules`."""
    numbers = {module: number for number, module in enumerate(root.modules())}
    return [_describe(module, numbers) for module in numbers]


def _describe(module: Module, numbers: dict[Module, int]) -> ModuleInfo:
    children = [(name, numbers[child]) for name, child in module._modules.items() if child is not None]
    container = next((name for name, kind in _CONTAINERS.items() if isinstance(module, kind)), "")
    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and name not in _OWN}
    plain = {name: value for name, value in public.items() if type(value) in _PLAIN and _fits(value)}
    names = {*public, *module._parameters, *module._buffers, *dir(type(module))} - set(plain) - set(module._modules)
    known = dir(_CONTAINERS[container]) if container else ()
    absent = sorted(name for name in names - _OWN - set(known) if not name.startswith("_"))
    return ModuleInfo(type(module).__name__, container, children, plain, absent, module.extra_repr())


def _fits(value: Any) -> bool:
    return type(value) is not int or -(2**63) <= value < 2**63


def build(infos: list[ModuleInfo]) -> Module:
    """The modules that `describe` told of."""
    classes: dict[tuple[str, str], type[Module]] = {}
    modules = []
    for info in infos:
        known = info.kind, info.container
        if known not in classes:
            base = _CONTAINERS.get(info.container, Module)
            classes[known] = type(info.kind, (Bone, base), {"__module__": __name__})
        modules.append(classes[known]())
    for info, module in zip(infos, modules, strict=True):
        for name, number in info.children:
            module._modules[name] = modules[number]
        vars(module).update(info.plain, _absent=frozenset(info.absent), _text=info.text, _closed=True)
    return modules[0]


class Bone(Module):
    """A module of a skeleton: there to be named, and to nothing else."""

    _absent: frozenset[str] = frozenset()
    _text = ""
    _closed = False

    def __getattr__(self, name: str) -> Any:
        if name in self._absent:
            _refuse(f"{type(self).__name__}.{name}")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._closed:
            raise EngineError(f"Setting {type(self).__name__}.{name} {_NO_CHANGE}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise EngineError(f"Deleting {type(self).__name__}.{name} {_NO_CHANGE}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise EngineError(
            f"A call of {type(self).__name__} needs its weights, which the engine's worker alone has: a confined block "
            "reads and changes the values that the engine computes. Blocks that are trusted can call modules."
        )

    forward = __call__

    def extra_repr(self) -> str:
        return self._text


def _refuse(what: str) -> NoReturn:
    raise EngineError(
        f"{what} is in the engine's worker alone: a confined block has the names of the modules and the values that the "
        "engine computes, no weights. Blocks that are trusted can read it."
    )


def _refused(name: str) -> Any:
    def method(self: Bone, *_args: Any, **_kwargs: Any) -> NoReturn:
        _refuse(f"{type(self).__name__}.{name}()")

    method.__name__ = name
    return method


# What a model without weights would answer in silence, with nothing, or do without any effect on the engine.
for _name in (
    *("parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "get_parameter", "get_buffer"),
    *("load_state_dict", "to", "to_empty", "cpu", "cuda", "half", "float", "double", "bfloat16", "type", "_apply"),
    *("train", "eval", "requires_grad_", "zero_grad", "register_forward_hook", "register_forward_pre_hook", "compile"),
    *("register_full_backward_hook", "register_module", "add_module", "register_buffer", "register_parameter"),
):
    setattr(Bone, _name, _refused(_name))

DEVICE = torch.device("cpu")  # where a confined block has its values
_NO_CHANGE = (
    "would change nothing: the modules are the worker's, and a confined block changes the values that they give."
)
