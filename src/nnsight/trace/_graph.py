"""Graph: autograd's graph behind a loss, for telling which gradients can still come."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge


class Edge(NamedTuple):
    """Where a tensor's gradient arrives: a node of the graph, and which of the outputs of its forward."""

    node: Any
    output: int


def edge_of(tensor: torch.Tensor) -> Edge:
    """The edge of a tensor that requires grad, as the tensor is now: an in-place edit moves it."""
    edge = get_gradient_edge(tensor)
    return Edge(edge.node, edge.output_nr)


class Graph:
    """The nodes that backward can run, from the loss to the leaves."""

    def __init__(self, root: Edge) -> None:
        self._edges = {root}
        self._next: dict[Any, tuple[Any, ...]] = {}
        self._rank: dict[Any, int] = {}  # a node that runs earlier has a higher one
        self._walk(root.node)

    def __contains__(self, edge: Edge) -> bool:
        return edge in self._edges

    def runs_before(self, node: Any, other: Any) -> bool:
        """Whether `node` must have run before `other` can."""
        lowest = self._rank[other]
        stack, seen = [node], {node}
        while stack:
            for following in self._next[stack.pop()]:
                if following is other:
                    return True
                if following not in seen and self._rank[following] > lowest:
                    seen.add(following)
                    stack.append(following)
        return False

    def _walk(self, root: Any) -> None:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self._next:
                stack.pop()
                self._rank.setdefault(node, len(self._rank))
                continue
            edges = [Edge(*edge) for edge in node.next_functions if edge[0] is not None]
            self._edges.update(edges)
            self._next[node] = tuple({edge.node for edge in edges})
            stack += [following for following in self._next[node] if following not in self._next]
