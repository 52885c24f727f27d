"""The graph inspector: which module fed which in a forward, and how much of a metric flows along each edge."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nnsight import NNsight

from ._cut import INPUT, OUTPUT, CutRun, choose_nodes, run_cut, run_plainly

Metric = Callable[[Any], torch.Tensor]


class Flow(NamedTuple):
    """One edge: `source` fed `target`; the weight is None where none was computed."""

    source: str
    target: str
    weight: float | None


@dataclass(frozen=True)
class ModuleGraph:
    """Which module fed which, as data.

    Attributes:
        nodes: The modules' paths, in the order in which they ran, between `"input"` and `"output"`.
        edges: An edge for each module whose result reached another's input by way of no third.
        shapes: The shape of each node's result.
        metric: The metric's value where the edges have weights.
    """

    nodes: tuple[str, ...]
    edges: tuple[Flow, ...]
    shapes: dict[str, tuple[int, ...]]
    metric: float | None = None

    def feeders(self, node: str) -> tuple[str, ...]:
        """The nodes that fed this one."""
        return tuple(edge.source for edge in self.edges if edge.target == node)

    def readers(self, node: str) -> tuple[str, ...]:
        """The nodes that this one fed."""
        return tuple(edge.target for edge in self.edges if edge.source == node)

    def strongest(self, count: int) -> ModuleGraph:
        """The same nodes with the `count` edges of largest weight, and without the nodes that none of them touches."""
        kept = sorted(self.edges, key=lambda edge: -abs(edge.weight or 0.0))[:count]
        touched = {name for edge in kept for name in edge[:2]}
        edges = tuple(edge for edge in self.edges if edge in kept)
        return ModuleGraph(tuple(n for n in self.nodes if n in touched), edges, self.shapes, self.metric)

    def plot(self, path: str | os.PathLike[str] | None = None, *, title: str = "", theme: Any = None) -> Any:
        """Draw the graph; a path that ends in `.html` writes a page in which weak edges can be hidden."""
        from nnsight import plots

        weighted = self.metric is not None
        edges = [edge if weighted else edge[:2] for edge in self.edges]
        labels = {name: _short(name) for name in self.nodes}
        details = {name: f"{name} {list(self.shapes[name])}" for name in self.nodes if name in self.shapes}
        return plots.graph(
            labels,
            edges,  # pyright: ignore[reportArgumentType]
            details=details,
            title=title,
            value_label="attribution",
            path=path,
            theme=theme,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph to a JSON file."""
        found = {"nodes": self.nodes, "edges": self.edges, "shapes": self.shapes, "metric": self.metric}
        Path(path).write_text(json.dumps(found) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModuleGraph:
        """Read a file that `save` wrote."""
        found = json.loads(Path(path).read_text("utf-8"))
        shapes = {name: tuple(shape) for name, shape in found["shapes"].items()}
        return cls(tuple(found["nodes"]), tuple(Flow(*edge) for edge in found["edges"]), shapes, found["metric"])

    def __repr__(self) -> str:
        metric = "" if self.metric is None else f", metric {self.metric:.4g}"
        return f"ModuleGraph({len(self.nodes)} nodes, {len(self.edges)} edges{metric})"


def trace_graph(model: NNsight, *inputs: Any, modules: Sequence[Any] | None = None, **kwargs: Any) -> ModuleGraph:
    """Record which module fed which in one forward, from the tensors themselves.

    Each module's result is given on as a new leaf of the autograd graph; whatever a later input was computed from shows
    in its graph, through sums, norms and views. So the graph is that of this forward, and not of the source. Token ids
    and the like, which have no gradient, are followed by their storage. What passes through whole numbers in between
    (a router's choice) is not seen.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import trace_graph
        >>> model = LanguageModel("nnsight/landmarks")
        >>> graph = trace_graph(model, "The Eiffel Tower is in")
        >>> graph.feeders("transformer.h.0.mlp")
        ('transformer.wte', 'transformer.wpe', 'transformer.h.0.attn')

    Args:
        model: The model.
        *inputs: As for `model.trace`.
        modules: Envoys or paths to be the nodes, none inside another; by default the parts of each block (attention, MLP)
            and the leaves with parameters outside of the blocks, or all such leaves where there are no blocks.
        **kwargs: As for `model.trace`.

    Returns:
        The graph, with `"input"` and `"output"` for the model's own.

    Raises:
        InputError: A node is inside another, or is called several times in a forward.
    """
    nodes = choose_nodes(model, modules, inputs, kwargs)
    return _graph(run_cut(model, nodes, inputs, kwargs))


def information_flow(
    model: NNsight,
    *inputs: Any,
    metric: Metric,
    corrupted: Any = None,
    modules: Sequence[Any] | None = None,
    **kwargs: Any,
) -> ModuleGraph:
    """Weight each edge of the graph by its part in a metric: edge attribution patching (Syed, Rager & Conmy 2023).

    The weight of `A → B` is the gradient of the metric, through that edge alone, times the difference between what `A`
    gives and what it gives for the corrupted input (0 without one): to first order, what the metric would lose if `B`
    were fed the other value. The weights of all edges out of `A` add up to its attribution by the plain gradient.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import information_flow
        >>> model = LanguageModel("nnsight/landmarks")
        >>> paris = model.tokenizer(" Paris")["input_ids"][0]
        >>> flow = information_flow(
        ...     model,
        ...     "The Eiffel Tower is in the city of",
        ...     corrupted="The Prado Museum is in the city of",
        ...     metric=lambda output: output.logits[0, -1, paris],
        ... )
        >>> flow.strongest(20).plot("flow.html")                                   # doctest: +SKIP

    Args:
        model: The model.
        *inputs: As for `model.trace`.
        metric: From the model's output to one number.
        corrupted: Another input, of the same shape.
        modules: The nodes, as for `trace_graph`.
        **kwargs: As for `model.trace`.

    Returns:
        The graph with weights, and the metric's value.

    Raises:
        InputError: A node is inside another or called several times, the metric is not one number, or the corrupted
            input gives values of other shapes.
    """
    nodes = choose_nodes(model, modules, inputs, kwargs)
    other = None if corrupted is None else run_plainly(model, nodes, (corrupted,), kwargs)
    run = run_cut(model, nodes, inputs, kwargs, metric)
    weights = run.attributions(other)
    assert run.metric is not None
    return _graph(run, weights, run.metric.item())


def _graph(
    run: CutRun, weights: dict[tuple[str, str], float] | None = None, metric: float | None = None
) -> ModuleGraph:
    order = (INPUT, *run.names, OUTPUT)
    place = {name: i for i, name in enumerate(order)}
    edges = [(source, target) for target, sources in run.feeders().items() for source in sources]
    edges.sort(key=lambda edge: (place[edge[1]], place[edge[0]]))
    touched = {name for edge in edges for name in edge} | set(run.names)
    flows = tuple(Flow(*edge, None if weights is None else weights.get(edge, 0.0)) for edge in edges)
    return ModuleGraph(tuple(name for name in order if name in touched), flows, run.shapes(), metric)


def _short(name: str) -> str:
    """The last two parts of a path, with the number of the block: `3.mlp`."""
    return ".".join(name.split(".")[-2:]) if any(part.isdigit() for part in name.split(".")) else name.split(".")[-1]
