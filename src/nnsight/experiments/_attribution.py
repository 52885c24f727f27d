"""Attribution patching: what every patch would do, from gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from nnsight import LanguageModel, errors

from ._metrics import Metric
from ._patching import Direction, Over, PairRuns, axes_of
from ._progress import progress_bar
from ._prompts import encode_pair
from ._result import Result
from ._runner import Runner
from ._sweep import dim_of, patches_over, sites_of

Method = Literal["atp", "ig"]
Values = dict[Any, torch.Tensor]


def attribution_patching(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Any,
    sites: str = "resid_pre",
    over: Over = ("layer", "pos"),
    *,
    method: Method = "atp",
    steps: int = 10,
    direction: Direction = "denoise",
    layers: Sequence[int] | None = None,
    memory: int | str = "1GB",
    progress: bool = True,
) -> Result:
    """Estimate what each patch of `activation_patching` gives, from gradients.

    `atp` takes one backward pass: a patch is the gradient times the change (Nanda 2023, Syed et al. 2023). Where the model
    saturates, that gradient says little; `ig` averages it along the straight line between the two values of a site
    (Sundararajan et al. 2017, Hanna et al. 2024), so that the effects of a layer add up to that of patching it as a whole.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import attribution_patching, logit_diff
        >>> model = LanguageModel("nnsight/landmarks")
        >>> estimate = attribution_patching(
        ...     model,
        ...     "The Eiffel Tower is in the city of",
        ...     "The Colosseum is in the city of",
        ...     logit_diff(" Paris", " Rome"),
        ...     progress=False,
        ... )
        >>> list(estimate.axes)
        ['layer', 'pos']

    Args:
        model: The model.
        clean: As for `activation_patching`.
        corrupted: As for `activation_patching`.
        metric: As for `activation_patching`; it must be differentiable.
        sites: A value of the vocabulary.
        over: As for `activation_patching`.
        method: `atp` or `ig`.
        steps: Points on the line, for `ig`.
        direction: As for `activation_patching`.
        layers: Some layers only.
        memory: As for `activation_patching`.
        progress: Show a progress bar.

    Returns:
        As `activation_patching`: the estimated metric with each patch alone.

    Raises:
        InputError: As for `activation_patching`, or the metric has no gradient.
    """
    if method not in ("atp", "ig") or steps < 1:
        raise errors.InputError(f"method is 'atp' or 'ig', with at least one step; not {method!r} with {steps}.")
    axes = axes_of(over)
    first, second = encode_pair(model, clean, corrupted)
    runs = PairRuns(model, first, second, metric, direction, memory)
    found = sites_of(model, sites, layers)
    dims = [dim_of(found[0], axis) for axis in axes]
    source = runs.record(found)
    # One number of all prompts stands in each of their rows: a row has its share of it.
    share = 1.0 if runs.scorer.per_pair else 1 / len(first)
    if method == "atp":
        effects = _atp(runs.base, found, source, progress, share)
    else:
        effects = _integrate(runs.base, found, source, steps, progress, share)
    table = torch.stack([_sum_over_others(effects[site], dims) for site in found], 1)
    if not runs.scorer.per_pair:  # one number of all prompts: what they change together
        table = table.sum(0, keepdim=True).expand(table.shape)
    base = runs.baseline["corrupted" if direction == "denoise" else "clean"]
    values = table + base.view(-1, *[1] * (table.dim() - 1))
    patches = patches_over(found, axes, source)
    by_patch = values.reshape(len(first), -1).T.contiguous()
    runs.leave_out_padding(by_patch, patches)
    labels = runs.labels(found, axes, table.shape[2:])
    title = f"attribution patching ({method}, {direction}) of {sites}"
    return runs.result(by_patch.T.reshape(1, *values.shape), [sites], True, labels, title)


def _sum_over_others(effect: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """`[prompt, …]` with the dimensions `dims` left, in their order."""
    kept = [0, *dims]
    others = [dim for dim in range(effect.dim()) if dim not in kept]
    summed = effect.sum(others) if others else effect
    order = sorted(kept)
    return summed.permute([order.index(dim) for dim in kept]).cpu()


def _atp(runner: Runner, sites: Sequence[Any], source: Values, progress: bool, share: float) -> Values:
    """Gradient times change of every site, `[prompt, …]`, with one backward pass a batch."""
    with progress_bar(len(runner.prompts), "gradients", progress) as bar:

        def run(rows: Sequence[int]) -> Values:
            live, gradients = _gradients(runner, list(rows), 0, sites, lambda site, value: value, share)
            bar.update(len(rows))
            prompts = torch.tensor(list(rows))
            return {site: (source[site][prompts] - live[site]) * gradients[site] for site in sites}

        parts = runner.budget.measure(range(len(runner.prompts)), run, runner.unit)
    return {site: torch.cat([part[site] for part in parts]) for site in sites}


def _integrate(
    runner: Runner, sites: Sequence[Any], source: Values, steps: int, progress: bool, share: float
) -> Values:
    """Average gradient times change of every site, `[prompt, …]`, site by site."""
    count = len(runner.prompts)
    points = [(step + 0.5) / steps for step in range(steps)]
    rows = list(itertools.product(points, range(count)))
    effects = {}
    with progress_bar(len(rows) * len(sites), "gradients", progress) as bar:
        for site in sites:

            def run(batch: Sequence[tuple[float, int]], site: Any = site) -> torch.Tensor:
                shares = torch.tensor([share for share, _ in batch])
                prompts = torch.tensor([prompt for _, prompt in batch])
                line: dict[str, torch.Tensor] = {}

                def move(site: Any, live: torch.Tensor) -> torch.Tensor:
                    line["change"] = source[site][prompts] - live
                    return live + shares.to(live).view(-1, *[1] * (live.dim() - 1)) * line["change"]

                _, gradients = _gradients(runner, prompts.tolist(), site.layer or 0, [site], move, share)
                bar.update(len(batch))
                return gradients[site] * line["change"]

            parts = torch.cat(runner.budget.measure(rows, run, runner.unit))
            effects[site] = parts.view(steps, count, *parts.shape[1:]).mean(0)
    return effects


def _gradients(
    runner: Runner,
    prompts: Sequence[int],
    layer: int,
    sites: Sequence[Any],
    change: Callable[[Any, torch.Tensor], torch.Tensor],
    share: float,
) -> tuple[Values, Values]:
    """The values of sites in a run from `layer` on, with what `change` makes of them put there, and the metric's gradients."""
    live: Values = {}
    leaves: Values = {}

    def act() -> None:
        for site in sorted(sites, key=lambda site: site.order):
            value = site.read()
            live[site] = value.detach().clone()
            new = change(site, live[site])
            leaves[site] = torch.zeros_like(new).requires_grad_()
            site.write((value if new is live[site] else new) + leaves[site])

    with torch.enable_grad():
        output = runner.run_all(prompts, layer, act)
        numbers = runner.scorer(output, torch.tensor(prompts))
        total = numbers.sum() * share
        if not total.requires_grad:
            raise errors.InputError("The metric has no gradient: give one that is differentiable.")
        found = torch.autograd.grad(total, [leaves[site] for site in sites], allow_unused=True)
    gradients = [torch.zeros_like(leaves[s]) if g is None else g for s, g in zip(sites, found, strict=True)]
    return live, dict(zip(sites, gradients, strict=True))
