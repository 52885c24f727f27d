"""A forward cut into its nodes: each node's inputs and results are leaves of the autograd graph, so that what lies between
two nodes can be told from what lies within them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from nnsight import Envoy, NNsight, errors

INPUT, OUTPUT = "input", "output"


class Cut:
    """Tensors on both sides of a cut: `before`, with the graph they come from, and the leaves that go on."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []
        self.leaves: list[torch.Tensor] = []
        self.fixed: list[torch.Tensor] = []  # those that can have no gradient, such as token ids

    def through(self, value: Any) -> Any:
        """The value with its floating-point tensors cut."""

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                self.fixed.append(tensor)
                return tensor
            leaf = tensor.detach().clone().requires_grad_()
            self.before.append(tensor)
            self.leaves.append(leaf)
            return leaf.clone()  # not the leaf itself: the model may change what it gets in place

        return _map(cut, value)


class CutRun:
    """What a forward was made of: the cuts around each node.

    Args:
        names: The nodes, in the order in which they ran.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.ins = {name: Cut() for name in (*names, OUTPUT)}
        self.outs = {name: Cut() for name in (INPUT, *names)}
        self.metric: torch.Tensor | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each node's first result."""
        found = {name: (*cut.leaves, *cut.fixed) for name, cut in self.outs.items()}
        return {name: tuple(tensors[0].shape) for name, tensors in found.items() if tensors}

    def feeders(self) -> dict[str, tuple[str, ...]]:
        """For each node, those whose results its inputs were computed from."""
        owners = {id(leaf): name for name, cut in self.outs.items() for leaf in cut.leaves}
        places = {t.untyped_storage().data_ptr(): name for name, cut in self.outs.items() for t in cut.fixed}
        found = {}
        for target, cut in self.ins.items():
            sources = {owners[id(leaf)] for leaf in _leaves_below(cut.before) if id(leaf) in owners}
            sources |= {places[p] for t in cut.fixed if (p := t.untyped_storage().data_ptr()) in places}
            found[target] = tuple(sorted(sources - {target}))
        return found

    def attributions(self, other: Mapping[str, Sequence[torch.Tensor]] | None) -> dict[tuple[str, str], float]:
        """For each edge, the metric's gradient through it times what its source gives, less what it gives in `other`.

        Nodes are taken from the last to the first, so that a node's own gradient is complete when it is passed on.
        """
        assert self.metric is not None
        gradients: dict[int, torch.Tensor] = {}  # of the metric, by leaf of a result
        weights: dict[tuple[str, str], float] = {}
        feeders = self.feeders()
        self._pass_back([self.metric], [torch.ones_like(self.metric)], OUTPUT, feeders, gradients, weights, other)
        for name in reversed(self.names):
            ins, outs = self.ins[name], self.outs[name]
            results = [
                (t, gradients[id(leaf)])
                for t, leaf in zip(outs.before, outs.leaves, strict=True)
                if id(leaf) in gradients
            ]
            results = [(t, g) for t, g in results if t.requires_grad]
            if not results or not ins.leaves:
                continue
            tensors, given = _columns(results)
            found = torch.autograd.grad(tensors, ins.leaves, given, retain_graph=True, allow_unused=True)
            pairs = [(t, g) for t, g in zip(ins.before, found, strict=True) if g is not None and t.requires_grad]
            if pairs:
                self._pass_back(*_columns(pairs), name, feeders, gradients, weights, other)
        return weights

    def _pass_back(
        self,
        tensors: Sequence[torch.Tensor],
        given: Sequence[torch.Tensor],
        target: str,
        feeders: Mapping[str, Sequence[str]],
        gradients: dict[int, torch.Tensor],
        weights: dict[tuple[str, str], float],
        other: Mapping[str, Sequence[torch.Tensor]] | None,
    ) -> None:
        """Hand the gradient of a node's inputs to those that fed it."""
        pairs = [(name, i) for name in feeders[target] for i in range(len(self.outs[name].leaves))]
        leaves = [self.outs[name].leaves[i] for name, i in pairs]
        if not leaves:
            return
        found = torch.autograd.grad(tensors, leaves, given, retain_graph=True, allow_unused=True)
        for (name, i), leaf, gradient in zip(pairs, leaves, found, strict=True):
            if gradient is None:
                continue
            gradients[id(leaf)] = gradients.get(id(leaf), 0) + gradient
            value = leaf.detach()
            if other is not None and name in other:
                value = value - _like(other[name][i], value, name)
            part = (gradient.double() * value.double()).sum().item()
            weights[name, target] = weights.get((name, target), 0.0) + part


def choose_nodes(
    model: NNsight, modules: Sequence[Any] | None, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[str]:
    """The paths of the nodes that run, in the order in which they do.

    Raises:
        InputError: One is inside another, or is called several times.
    """
    if hasattr(model, "dispatch"):
        model.dispatch()
    root = model._model
    if modules is None:
        names = _default_nodes(root)
    else:
        envoys = [model.get(m) if isinstance(m, str) else m for m in modules]
        names = [envoy.path.removeprefix("model.") if isinstance(envoy, Envoy) else "" for envoy in envoys]
        if not names or not all(names):
            raise errors.InputError("modules are envoys or paths of modules inside the model, at least one.")
    for one in names:
        inside = next((other for other in names if other.startswith(f"{one}.")), None)
        if inside is not None:
            raise errors.InputError(f"{inside} is inside {one}: a node is inside no other. Choose one of the two.")
    calls: list[str] = []
    handles = [root.get_submodule(name).register_forward_pre_hook(_note(calls, name)) for name in names]
    try:
        with torch.no_grad():
            model.trace(*inputs, trace=False, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    twice = next((name for name in calls if calls.count(name) > 1), None)
    if twice is not None:
        raise errors.InputError(
            f"{twice} is called {calls.count(twice)} times in a forward, so it is no single node: leave it out with modules=."
        )
    return calls


def _note(calls: list[str], name: str) -> Callable[..., None]:
    return lambda *_: calls.append(name)


def run_cut(
    model: NNsight,
    names: Sequence[str],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    metric: Callable[[Any], torch.Tensor] | None = None,
) -> CutRun:
    """One forward with a cut around each node; its numbers are those of a plain one.

    Raises:
        InputError: The metric is not one number.
    """
    run = CutRun(names)
    with torch.enable_grad(), model.trace(*inputs, **kwargs):
        model.inputs = run.outs[INPUT].through(model.inputs)
        for name in names:
            envoy = model.get(name)
            envoy.inputs = run.ins[name].through(envoy.inputs)
            envoy.output = run.outs[name].through(_native(envoy.output))
        output = model.output
        if metric is None:
            run.ins[OUTPUT].before = list(_tensors(output))
        else:
            run.metric = metric(output)
            if not isinstance(run.metric, torch.Tensor) or run.metric.numel() != 1 or not run.metric.requires_grad:
                raise errors.InputError(
                    "The metric is a function of the output to a tensor of one number, with a gradient."
                )
            run.ins[OUTPUT].before = [run.metric]
    return run


def run_plainly(
    model: NNsight, names: Sequence[str], inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[torch.Tensor]]:
    """What each node gives, and the input where it has gradients, for another input."""
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, value: Any) -> None:
        found[name] = [t.detach().clone() for t in _tensors(value) if t.is_floating_point()]

    with torch.no_grad(), model.trace(*inputs, **kwargs):
        keep(INPUT, model.inputs)
        for name in names:
            keep(name, _native(model.get(name).output))
    return found


def _default_nodes(root: torch.nn.Module) -> list[str]:
    """Parts of the blocks of the longest list of blocks, and leaves with parameters elsewhere."""
    lists = [
        (name, module)
        for name, module in root.named_modules()
        if isinstance(module, torch.nn.ModuleList) and all(next(block.children(), None) is not None for block in module)
    ]
    name, blocks = max(lists, key=lambda pair: len(pair[1]), default=("", []))
    parts = [
        f"{name}.{i}.{part}"
        for i, block in enumerate(blocks)
        for part, module in block.named_children()
        if next(module.children(), None) is not None
    ]
    leaves = [
        path
        for path, module in root.named_modules()
        if path and next(module.children(), None) is None and next(module.parameters(), None) is not None
        if not parts or not path.startswith(f"{name}.")
    ]
    return parts + leaves


def _leaves_below(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The leaves that tensors were computed from."""
    yield from (tensor for tensor in tensors if tensor.grad_fn is None)
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for earlier, _ in node.next_functions:
            if earlier is not None and earlier not in seen:
                seen.add(earlier)
                waiting.append(earlier)


def _native(value: Any) -> Any:
    """A block's output as the plain tensor that it shows."""
    return value[0] if isinstance(value, torch.Tensor) and type(value).__name__ == "BlockOutput" else value


def _map(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(change, item) for item in value))
    if isinstance(value, (tuple, list)):
        items = [_map(change, item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if type(value) is dict:
        return {key: _map(change, item) for key, item in value.items()}
    return value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in _tensors(item)]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _columns(pairs: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def _like(other: torch.Tensor, value: torch.Tensor, name: str) -> torch.Tensor:
    if other.shape != value.shape:
        raise errors.InputError(
            f"The corrupted input gives {name} the shape {list(other.shape)}, the clean one {list(value.shape)}: choose inputs "
            "of the same length."
        )
    return other.to(value)
