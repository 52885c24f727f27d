"""One trace against plain hooks, bit for bit: what the model returns, what is read, and what is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import nn

from nnsight import LanguageModel, NNsight

from .models import MLP, Decoder, InPlace, Pairs, Recurrent, Router, gpt2, llama
from .profile import profile


class CNN(nn.Module):
    """Batch norm in training mode, which changes its own buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.head = nn.Linear(12, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(image).flatten(1))


class Noisy(nn.Module):
    """Dropout in training mode, a keyword argument, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.noise = nn.Dropout(0.5)
        self.bilinear = nn.Bilinear(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.noise(self.layer(x))
        return self.bilinear(input1=x, input2=self.noise(self.layer(x)))


class Named(NamedTuple):
    first: torch.Tensor
    rest: tuple[torch.Tensor, ...]


@dataclass
class Record:
    first: torch.Tensor
    named: Named


class Structured(nn.Module):
    """A named tuple in a dataclass."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> Named:
            first, *rest = (layer(x) for layer in self.layers)
            return Named(first, tuple(rest))

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> Record:
        named = self.inner(x)
        return Record(self.norm(named.first + named.rest[-1]), named)


def tokens() -> torch.Tensor:
    return torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "mlp": (MLP, lambda: torch.randn(3, 4)),
    "in_place": (InPlace, lambda: torch.randn(3, 4)),
    "router": (Router, lambda: torch.randn(2, 3, 4)),
    "pairs": (Pairs, lambda: torch.randn(3, 4)),
    "recurrent": (Recurrent, lambda: torch.randn(2, 3, 4)),
    "cnn": (CNN, lambda: torch.randn(2, 1, 6, 6)),
    "noisy": (Noisy, lambda: torch.randn(3, 4)),
    "structured": (Structured, lambda: torch.randn(3, 4)),
    "decoder": (Decoder, tokens),
    "gpt2": (gpt2, tokens),
    "llama": (llama, tokens),
}
LANGUAGE = ("decoder", "gpt2", "llama")


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    make, make_input = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, x = make(), make_input()
    return module.eval() if name in LANGUAGE else module.train(), x


def wrap(module: nn.Module, name: str) -> NNsight:
    return LanguageModel(module) if name in ("gpt2", "llama") else NNsight(module)


# --- no edits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_without_edits(name, reading):
    module, x = build(name)
    plain = copy.deepcopy(module)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = plain(x)
    model = wrap(module, name)
    calls = list(dict.fromkeys(event for event in events(name) if event[1] == "output")) if reading else []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with model.trace(x) as tracer:
            for path, _ in calls:
                envoy_at(model, path).output
            result = tracer.result
    assert_same(result, expected)
    assert_same(dict(module.state_dict()), dict(plain.state_dict()))
    assert type(result).__mro__[-len(type(expected).__mro__) :] == type(expected).__mro__


# --- edits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Act:
    """Something done at the first call of a module.

    `do`: read, in_place, assign, item (assigned in a tuple), first (argument exchanged), skip.
    """

    path: str
    kind: str
    do: str
    scale: float = 1.0
    item: int = 0


def change(value: Any, scale: float) -> Any:
    return map_floats(lambda tensor: tensor.tanh() * scale, value)


class Hooked:
    """The acts by plain hooks."""

    def __init__(self, module: nn.Module, acts: list[Act]) -> None:
        self.module = module
        self.waiting = list(acts)
        self.reads: list[Any] = []
        self.skipped: dict[str, Any] = {}

    def run(self, x: torch.Tensor) -> Any:
        handles = []
        for path, module in self.module.named_modules():
            handles.append(module.register_forward_pre_hook(self.before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self.after(path)))
            if any(act.do == "skip" and act.path == path for act in self.waiting):
                module.forward = self.unless_skipped(path, module.forward)
        try:
            return self.module(x)
        finally:
            for handle in handles:
                handle.remove()
            for module in self.module.modules():
                vars(module).pop("forward", None)

    def acts_at(self, path: str, kind: str) -> Iterator[Act]:
        while self.waiting and (self.waiting[0].path, self.waiting[0].kind) == (path, kind):
            yield self.waiting.pop(0)

    def before(self, path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            for act in self.acts_at(path, "input"):
                if act.do == "read":
                    self.reads.append((args, kwargs))
                elif act.do == "in_place":
                    multiply((args, kwargs), act.scale)
                elif act.do == "assign":
                    args, kwargs = change(args, act.scale), change(kwargs, act.scale)
                elif act.do == "skip":
                    self.skipped[path] = skip_value(self.module, path, args, kwargs, act.scale)
                elif args:
                    args = (change(args[0], act.scale), *args[1:])
                else:
                    name = next(iter(kwargs))
                    kwargs = {**kwargs, name: change(kwargs[name], act.scale)}
            return args, kwargs

        return hook

    def after(self, path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            for act in self.acts_at(path, "output"):
                if act.do == "read":
                    self.reads.append(output)
                elif act.do == "in_place":
                    multiply(output, act.scale)
                elif act.do == "assign":
                    output = change(output, act.scale)
                else:
                    items = list(output)
                    items[act.item] = change(items[act.item], act.scale)
                    output = type(output)(*items) if hasattr(output, "_fields") else tuple(items)
            return output

        return hook

    def unless_skipped(self, path: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.skipped.pop(path) if path in self.skipped else plain(*args, **kwargs)


def traced(model: NNsight, acts: list[Act], x: torch.Tensor) -> tuple[Any, list[Any]]:
    """The acts in a trace."""
    reads = []
    with model.trace(x) as tracer:
        for act in acts:
            envoy = envoy_at(model, act.path)
            at_output = act.kind == "output"
            if act.do == "read":
                reads.append(envoy.output if at_output else envoy.inputs)
            elif act.do == "in_place":
                multiply(envoy.output if at_output else envoy.inputs, act.scale)
            elif act.do == "skip":
                envoy.skip(skip_value(model._module, act.path, *envoy.inputs, act.scale))
            elif act.do == "first":
                envoy.input = change(envoy.input, act.scale)
            elif act.do == "item":
                envoy.output[act.item] = change(envoy.output[act.item], act.scale)
            elif at_output:
                envoy.output = change(envoy.output, act.scale)
            else:
                args, kwargs = envoy.inputs
                envoy.inputs = change(args, act.scale), change(kwargs, act.scale)
        result = tracer.result
    return result, reads


def skip_value(root: nn.Module, path: str, args: Any, kwargs: Any, scale: float) -> Any:
    """What the module would have returned, changed; computed by a copy of it."""
    module = copy.deepcopy(root.get_submodule(path))
    for inner in module.modules():
        vars(inner).pop("forward", None)
        inner._forward_hooks.clear()
        inner._forward_pre_hooks.clear()
        inner._forward_pre_hooks_with_kwargs.clear()
    with torch.random.fork_rng():
        return change(module(*copied(args), **copied(kwargs)), scale)


@st.composite
def scripts(draw: st.DrawFn) -> tuple[str, list[Act]]:
    """A model, and acts in the order of its forward."""
    name = draw(st.sampled_from(list(MODELS)))
    order = events(name)
    indices = sorted(draw(st.lists(st.integers(0, len(order) - 1), min_size=1, max_size=6)))
    acts: list[Act] = []
    skipped: str | None = None
    for index in indices:
        path, kind = order[index]
        if skipped is not None and path.startswith(f"{skipped}.") and index < order.index((skipped, "output")):
            continue
        act = Act(
            path, kind, draw(st.sampled_from(possible(name, path, kind))), draw(st.sampled_from((0.5, -1.0, 2.0)))
        )
        if act.do == "skip":
            if skipped is not None:
                continue
            skipped = path
        if act.do == "item":
            act = replace(act, item=draw(st.integers(0, 1)))
        acts.append(act)
    return name, acts


def possible(name: str, path: str, kind: str) -> list[str]:
    if name in LANGUAGE and not path:
        return ["read"]  # an output with a cache
    if kind == "input":
        skips = path and not path.endswith(("attn", "h.0", "h.1", "layers.0", "layers.1", "lstm", "noise"))
        return ["read", "in_place", "assign", "first", *(["skip"] if skips else [])]
    module = build(name)[0].get_submodule(path)
    return ["read", "in_place", "assign", *(["item"] if type(module).__name__ in ("Split", "Pairs", "Inner") else [])]


@profile(300)
@given(scripts())
def test_edits(script):
    name, acts = script
    note(f"\n# {name}\n" + "\n".join(map(str, acts)))
    module, x = build(name)
    plain = copy.deepcopy(module)
    hooked = Hooked(plain, acts)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        expected = hooked.run(x.clone())
        torch.manual_seed(1)
        result, reads = traced(wrap(module, name), acts, x.clone())
    assert not hooked.waiting
    assert_same(result, expected)
    assert_same(reads, hooked.reads)
    assert_same(dict(module.state_dict()), dict(plain.state_dict()))


# --- values ---------------------------------------------------------------------------------------------------


def events(name: str) -> list[tuple[str, str]]:
    """The first calls of the modules, as plain hooks see them begin and end."""
    module, x = build(name)
    found: dict[tuple[str, str], None] = {}
    for path, inner in module.named_modules():
        inner.register_forward_pre_hook(lambda *_, path=path: found.setdefault((path, "input")))
        inner.register_forward_hook(lambda *_, path=path: found.setdefault((path, "output")))
    with torch.no_grad(), torch.random.fork_rng():
        module(x)
    if name in LANGUAGE:
        del found["", "input"]  # a language model passes its input as keywords, with a mask
    return list(found)


def envoy_at(model: NNsight, path: str) -> Any:
    return model.get(path) if path else model


def map_floats(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """`value` with `function` applied to its tensors of floating point numbers."""
    if isinstance(value, torch.Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, tuple):
        items = [map_floats(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        return type(value)({key: map_floats(function, item) for key, item in value.items()})
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_floats(function, getattr(value, f.name)) for f in fields(value)})
    return value


def multiply(value: Any, scale: float) -> None:
    map_floats(lambda tensor: tensor.mul_(scale), value)


def copied(value: Any) -> Any:
    return map_floats(torch.clone, value)


def assert_same(found: Any, expected: Any) -> None:
    """Equal bit for bit, in containers of one form."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(torch.Tensor.detach(found), expected.detach())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (tuple, list)):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif is_dataclass(expected):
        for field in fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, (int, float, str, type(None))):
        assert found == expected
