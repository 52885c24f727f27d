"""Layered layout of a directed graph: ranks from the top, few crossings, long edges led between the boxes.

After Sugiyama, Tagawa and Toda (1981): ranks by longest path, a dummy node in every rank that an edge passes, and
sweeps that put each node at the mean place of its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

_SWEEPS = 12
_GAP = 18.0  # between boxes of a rank
_DUMMY = 8.0

Edge = tuple[str, str]
Point = tuple[float, float]


def place(
    widths: Mapping[str, float], edges: Sequence[Edge], rank_height: float
) -> tuple[dict[str, Point], dict[Edge, list[Point]], tuple[float, float]]:
    """The middle of each node, the points each edge runs through, and the size of all.

    Raises:
        ValueError: The edges go in a circle.
    """
    ranks = _ranks(widths, edges)
    sizes: dict[str, float] = dict(widths)
    chains: dict[Edge, list[str]] = {}
    levels: list[list[str]] = [[] for _ in range(max(ranks.values(), default=0) + 1)]
    for node in widths:
        levels[ranks[node]].append(node)
    for source, target in edges:
        between = []
        for rank in range(ranks[source] + 1, ranks[target]):
            dummy = f"\0{source}\0{target}\0{rank}"
            sizes[dummy] = _DUMMY
            levels[rank].append(dummy)
            between.append(dummy)
        chains[source, target] = [source, *between, target]
    links = _links(chains)
    _untangle(levels, links)
    xs = _spread(levels, links, sizes)
    left = min(x - sizes[node] / 2 for node, x in xs.items())
    points = {
        node: (xs[node] - left + _GAP, (i + 0.5) * rank_height) for i, level in enumerate(levels) for node in level
    }
    width = max(points[node][0] + sizes[node] / 2 for node in points) + _GAP
    routes = {edge: [points[node] for node in chain] for edge, chain in chains.items()}
    return {node: points[node] for node in widths}, routes, (width, len(levels) * rank_height)


def _ranks(nodes: Mapping[str, float], edges: Sequence[Edge]) -> dict[str, int]:
    before: dict[str, set[str]] = {node: set() for node in nodes}
    for source, target in edges:
        before[target].add(source)
    ranks: dict[str, int] = {}
    try:
        for node in TopologicalSorter(before).static_order():
            ranks[node] = max((ranks[earlier] + 1 for earlier in before[node]), default=0)
    except CycleError as error:
        raise ValueError(f"A layered graph has no circle; here is one: {' -> '.join(error.args[1])}.") from None
    return ranks


def _links(chains: Mapping[Edge, Sequence[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The neighbours of each node in the rank above, and below."""
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for chain in chains.values():
        for upper, lower in pairwise(chain):
            above.setdefault(lower, []).append(upper)
            below.setdefault(upper, []).append(lower)
    return above, below


def _untangle(levels: list[list[str]], links: tuple[dict[str, list[str]], dict[str, list[str]]]) -> None:
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        order = range(1, len(levels)) if down else range(len(levels) - 2, -1, -1)
        for i in order:
            places = {node: j for j, node in enumerate(levels[i - 1 if down else i + 1])}
            near = links[0 if down else 1]
            own = {node: j for j, node in enumerate(levels[i])}
            levels[i].sort(key=lambda node: _mean([places[n] for n in near.get(node, ())], own[node]))


def _spread(
    levels: list[list[str]], links: tuple[dict[str, list[str]], dict[str, list[str]]], sizes: Mapping[str, float]
) -> dict[str, float]:
    """Each node as near to the middle of its neighbours as the others of its rank let it."""
    xs: dict[str, float] = {}
    for level in levels:
        total = sum(sizes[node] + _GAP for node in level) - _GAP
        x = -total / 2
        for node in level:
            xs[node] = x + sizes[node] / 2
            x += sizes[node] + _GAP
    for sweep in range(_SWEEPS):
        near = links[sweep % 2]
        for level in levels if sweep % 2 == 0 else reversed(levels):
            wanted = [_mean([xs[n] for n in near.get(node, ())], xs[node]) for node in level]
            xs |= zip(level, _separate(wanted, [sizes[node] for node in level]), strict=True)
    return xs


def _separate(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Places in this order, without overlap, near to those wanted: runs of boxes that touch share their mean shift."""
    offsets = [0.0]
    for left, right in pairwise(sizes):
        offsets.append(offsets[-1] + (left + right) / 2 + _GAP)
    groups: list[tuple[float, int]] = []  # the mean of (wanted - offset), and how many
    for value, offset in zip(wanted, offsets, strict=True):
        mean, count = value - offset, 1
        while groups and groups[-1][0] > mean:
            other, many = groups.pop()
            mean, count = (mean * count + other * many) / (count + many), count + many
        groups.append((mean, count))
    starts = [mean for mean, count in groups for _ in range(count)]
    return [start + offset for start, offset in zip(starts, offsets, strict=True)]


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
