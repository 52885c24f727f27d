"""The oracle: what plain PyTorch hooks see and change in a plain call of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn import Module

Leaves = dict[str, torch.Tensor]
Edit = Callable[[Any], Any]


class Event(NamedTuple):
    """A module called, or returning, in the order in which it happens; `call` counts the module's calls."""

    path: str
    kind: str
    call: int
    leaves: Leaves
    native: type  # of the value


def leaves_of(value: Any, at: str = "", depth: int = 0) -> Leaves:
    """Every tensor in a value, by where it is: in containers, and in objects such as caches."""
    if isinstance(value, torch.Tensor):
        return {at: value}
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple | list):
        items = [(str(i), item) for i, item in enumerate(value)]
    elif hasattr(value, "__dict__") and depth < 6 and not isinstance(value, Module | type) and not callable(value):
        items = list(vars(value).items())
    else:
        return {}
    return {name: leaf for key, item in items for name, leaf in leaves_of(item, f"{at}.{key}", depth + 1).items()}


def copies_of(value: Any) -> Leaves:
    """The same as copies, which nothing changes later."""
    return {at: leaf.detach().clone() for at, leaf in leaves_of(value).items()}


def record(model: Module, call: Callable[[], Any]) -> list[Event]:
    """All inputs and outputs of all modules during `call`."""
    events: list[Event] = []
    names = {module: name for name, module in model.named_modules()}
    counts: dict[Module, int] = {}
    running: dict[Module, list[int]] = {}

    def begin(module: Module, args: Any, kwargs: Any) -> None:
        counts[module] = counts.get(module, -1) + 1
        running.setdefault(module, []).append(counts[module])
        events.append(Event(names[module], "input", counts[module], copies_of((args, kwargs)), tuple))

    def end(module: Module, _args: Any, _kwargs: Any, output: Any) -> None:
        call = running[module].pop()
        events.append(Event(names[module], "output", call, copies_of(output), type(output)))

    with hooks(
        *[module.register_forward_pre_hook(begin, with_kwargs=True) for module in names],
        *[module.register_forward_hook(end, with_kwargs=True) for module in names],
    ):
        call()
    return events


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_output(module: Module, edit: Edit) -> Any:
    """A hook that exchanges the first tensor of the module's output, or changes it in place."""

    def hook(_module: Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return edit(output)
        changed = edit(output[0])
        return None if changed is None else (changed, *output[1:])

    return module.register_forward_hook(hook)


def on_input(module: Module, edit: Edit) -> Any:
    """A hook that exchanges the first positional argument, or changes it in place."""

    def hook(_module: Module, args: tuple[Any, ...]) -> Any:
        changed = edit(args[0])
        return None if changed is None else (changed, *args[1:])

    return module.register_forward_pre_hook(hook)
