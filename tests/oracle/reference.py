"""What a program means, by plain hooks and one run for each input: no batch, no nnsight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .models import FLAT, ROWS, SEQ, STATES, TIME, Site
from .programs import Action, Program, Use

Key = tuple[Any, ...]  # block, number of the action, step, and for a gradient its name


class Reference:
    """The values of a program.

    `values[key][i]` is what the action logs for the input number `i`, `layouts[key]` how rows lie in it, and `results[i]` what
    the model returns.
    """

    def __init__(self, program: Program, module: nn.Module) -> None:
        self.program = program
        self.module = module
        self.values: dict[Key, dict[int, torch.Tensor]] = {}
        self.layouts: dict[Key, str] = {}
        self.results: dict[int, Any] = {}
        self.bound: dict[Key, dict[int, torch.Tensor]] = {}
        self._running: list[_Forward] = []

    def run(self) -> Reference:
        with _Hooks(self.module, lambda: self._running[-1], self._skipped_paths()):
            for i in range(len(self.program.inputs)):
                self.results[i] = self._forward(i, None)
        return self

    def vector(self, use: Use, step: int, i: int) -> torch.Tensor:
        """The value of a name in the run of input `i`, if need be by a run up to where it is bound."""
        block = self.program.blocks[use.block]
        covers = self.program.covers(block)
        source = (i if i in covers else covers[0]) if use.full else covers[-1]
        key = (use.block, use.number, step if use.step is None else use.step)
        if source not in self.bound.get(key, {}):
            self._forward(source, key)
        return self.bound[key][source]

    def log(self, key: Key, i: int, layout: str, value: torch.Tensor) -> None:
        self.layouts[key] = layout
        self.values.setdefault(key, {})[i] = value.detach().clone()

    def bind(self, key: Key, i: int, value: torch.Tensor) -> None:
        self.bound.setdefault(key, {})[i] = value
        if self._running[-1].until == key:
            raise _Enough

    def _forward(self, i: int, until: Key | None) -> Any:
        program = self.program
        one = program.inputs[i]
        inputs = program.spec.inputs(one.seed, one.rows, one.length)
        self._running.append(_Forward(self, i, until))
        try:
            with torch.set_grad_enabled(program.grad):
                if program.steps is None:
                    return self.module(*inputs)
                mask = torch.ones_like(inputs[0])
                return self.module.generate(*inputs, attention_mask=mask, max_new_tokens=program.steps, pad_token_id=0)
        except _Enough:
            return None
        finally:
            self._running.pop()

    def _skipped_paths(self) -> set[str]:
        return {a.site.path for a in self.program.actions if a.do == "skip" and a.site is not None}


class _Enough(Exception):
    """A run has come as far as it was needed."""


class _Forward:
    """The run of one input: what all blocks that see it do, event by event."""

    def __init__(self, reference: Reference, i: int, until: Key | None) -> None:
        self.i = i
        self.until = until
        self.step = -1
        self.called: set[tuple[int, str, str]] = set()
        self.instead: dict[str, torch.Tensor] = {}
        self._reference = reference
        self._inputs: dict[str, Any] = {}
        self._captured: dict[str, torch.Tensor] = {}
        program = reference.program
        self._timelines = [
            (number, list(block.timeline()))
            for number, block in enumerate(program.blocks)
            if i in program.covers(block)
        ]

    def is_first(self, path: str, kind: str) -> bool:
        """Whether the event comes for the first time in this step."""
        event = (self.step, path, kind)
        return event not in self.called and not self.called.add(event)

    def serve(self, path: str, kind: str, value: Any) -> Any:
        """Everything that the blocks do at an event, in the order they are written; the value as they leave it."""
        for number, timeline in self._timelines:
            for step, action in timeline:
                if step == self.step and _happens_at(action) == (path, kind):
                    value = self._do(number, step, action, value)
        for number, timeline in self._timelines:
            for step, action in timeline:
                if step == self.step and action.do == "late" and action.site.event == (path, kind):
                    self._log(number, step, action, _get(value, action.site))
        if kind == "input":
            self._inputs[path] = value
        return value

    def _do(self, number: int, step: int, action: Action, value: Any) -> Any:
        site = action.site
        assert site is not None
        if action.do == "back":
            self._log(number, step, action, _get(self._inputs[site.path], site))
            return value
        x = _get(value, site)
        if action.do == "capture":
            assert action.bind is not None
            self._captured[action.bind] = x
            return value
        if action.do == "backward":
            self._backward(number, step, action, x)
            return value
        if action.do == "read":
            self._log(number, step, action, x)
            if action.bind is not None:
                found = x.clone() if action.full else last_vector(x, site.layout).clone()
                self._reference.bind((number, action.number, step), self.i, found)
            return value
        return self._edit(number, step, action, x, value)

    def _edit(self, number: int, step: int, action: Action, x: torch.Tensor, value: Any) -> Any:
        added = self._reference.vector(action.use, step, self.i) if action.use is not None else 0.0
        site = action.site
        assert site is not None
        if action.do == "skip":
            self.instead[site.path] = _reshaped(x, action.shape) * action.scale + added
            return value
        if action.do == "assign":
            value = _put(value, site.item, _reshaped(x, action.shape) * action.scale + added)
        elif action.do == "inplace":
            x.copy_(_reshaped(x, action.shape) * action.scale + added)
        elif action.do == "column":
            x[..., 0] = action.scale
        else:
            last = x[:, -1] if site.layout == SEQ else x[-1]
            last.copy_(last * action.scale + added)
        self._log(number, step, action, _get(value, site))
        return value

    def _backward(self, number: int, step: int, action: Action, x: torch.Tensor) -> None:
        assert action.site is not None
        layout = action.site.layout
        loss = ((x[:, -1] if layout == SEQ else x) ** 2).sum()
        handles = []
        for name, scale in action.grads:

            def see(gradient: torch.Tensor, name: str = name, scale: float | None = scale) -> torch.Tensor | None:
                key = (number, action.number, step, name)
                self._reference.log(key, self.i, self._layout_of(number, name), gradient)
                return None if scale is None else gradient * scale

            handles.append(self._captured[name].register_hook(see))
        loss.backward(retain_graph=True)
        for handle in handles:
            handle.remove()

    def _layout_of(self, number: int, name: str) -> str:
        actions = (a for s in self._reference.program.blocks[number].segments for a in s.actions)
        return next(a.site.layout for a in actions if a.bind == name and a.site is not None)

    def _log(self, number: int, step: int, action: Action, x: torch.Tensor) -> None:
        assert action.site is not None
        self._reference.log((number, action.number, step), self.i, action.site.layout, x)


class _Hooks:
    """Plain hooks on every module; `forward` is replaced where a module may be skipped."""

    def __init__(self, module: nn.Module, current: Callable[[], _Forward], skipped: set[str]) -> None:
        self._module = module
        self._current = current
        self._skipped = skipped
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for path, inner in self._module.named_modules():
            self._handles.append(inner.register_forward_pre_hook(self._before(path), with_kwargs=True))
            self._handles.append(inner.register_forward_hook(self._after(path)))
            if path in self._skipped:
                inner.forward = self._unless_skipped(path, inner.forward)

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for path in self._skipped:
            del self._module.get_submodule(path).forward

    def _before(self, path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            current = self._current()
            if not path:
                current.step += 1
            if not current.is_first(path, "input"):
                return None
            if args:
                return (current.serve(path, "input", args[0]), *args[1:]), kwargs
            name = next(iter(kwargs), None)
            return (args, {**kwargs, name: current.serve(path, "input", kwargs[name])}) if name else None

        return hook

    def _after(self, path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            current = self._current()
            return current.serve(path, "output", output) if current.is_first(path, "output") else None

        return hook

    def _unless_skipped(self, path: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            instead = self._current().instead.pop(path, None)
            return plain(*args, **kwargs) if instead is None else instead

        return forward


# --- values -------------------------------------------------------------------------------------------------


def last_vector(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The vector of the last row, at its last position."""
    return x[-1] if layout in (ROWS, FLAT) else x[-1, -1]


def of_input(x: torch.Tensor, layout: str, rows: list[int], at: int, like: torch.Tensor) -> torch.Tensor:
    """The part of a batched value that belongs to the input number `at`, without the padding on the left.

    `rows` has the number of rows of each input, `like` the size that the part must have.
    """
    start, size, total = sum(rows[:at]), rows[at], sum(rows)
    if layout in (TIME, STATES):
        return x[:, start : start + size]
    if layout == FLAT:
        part = x.reshape(total, -1, x.shape[-1])[start : start + size]
        return part[:, part.shape[1] - like.shape[0] // size :].reshape(like.shape)
    part = x[start : start + size]
    return part[:, part.shape[1] - like.shape[1] :] if layout == SEQ else part


def _happens_at(action: Action) -> tuple[str, str] | None:
    if action.site is None or action.do == "late":
        return None
    return (action.site.path, "output") if action.do == "back" else action.site.event


def _reshaped(x: torch.Tensor, shape: str) -> torch.Tensor:
    return {"plain": lambda: x, "tanh": x.tanh, "flip": lambda: x.flip(-1)}[shape]()


def _get(value: Any, site: Site) -> torch.Tensor:
    for index in site.item:
        value = value[index]
    return value


def _put(value: Any, item: tuple[int, ...], new: torch.Tensor) -> Any:
    if not item:
        return new
    items = list(value)
    items[item[0]] = _put(items[item[0]], item[1:], new)
    return tuple(items)
