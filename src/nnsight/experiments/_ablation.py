"""Ablation: what a model does without a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from nnsight import LanguageModel, errors

from ._memory import Budget
from ._metrics import Metric, Scorer
from ._patching import Over, axes_of
from ._prompts import Prompts, encode
from ._result import PAIR, Result
from ._runner import Runner
from ._scoring import NoScore
from ._sweep import Replace, by_position, dim_of, patches_over, sites_of, sweep

Mode = Literal["zero", "mean", "resample"]


def ablate(
    model: LanguageModel,
    prompts: Any,
    metric: Metric | Any,
    sites: str = "head_z",
    over: Over = ("layer", "head"),
    mode: Mode | torch.Tensor = "mean",
    *,
    reference: Any = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    memory: int | str = "1GB",
    progress: bool = True,
) -> Result:
    """Take parts of a model out, one at a time, and measure what is left.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import ablate, log_prob
        >>> model = LanguageModel("nnsight/landmarks")
        >>> left = ablate(
        ...     model, "The Eiffel Tower is in the city of", log_prob(" Paris"), "mlp_out", "layer", "zero", progress=False
        ... )
        >>> left.best(smallest=True)
        {'layer': 0}

    Args:
        model: The model.
        prompts: A prompt or a list of prompts: text or token ids.
        metric: As for `activation_patching`.
        sites: A value of the vocabulary.
        over: What is taken out at a time, as for `activation_patching`.
        mode: What stands there instead: `zero`; the `mean` over all tokens of `reference`; the value that a randomly drawn
            prompt of `reference` has at the same position (`resample`, Chan et al. 2022); or a direction `[d]` that is
            projected out of the value (Arditi et al. 2024).
        reference: Prompts for `mean` and `resample`; by default `prompts`.
        layers: Some layers only.
        seed: For `resample`.
        memory: As for `activation_patching`.
        progress: Show a progress bar.

    Returns:
        The metric without each part, `[pair, layer, …]`, with the baseline `clean`; `pair`, which counts the prompts, is
        there with a list.

    Raises:
        InputError: The mode is none of these, or `reference` cannot stand in.
    """
    axes = axes_of(over)
    rows = encode(model, prompts)
    others = rows if reference is None else encode(model, reference)
    scorer = Scorer(metric, model, rows)
    budget = Budget(memory)
    runner = Runner(model, rows, scorer, budget)
    found = sites_of(model, sites, layers)
    dims = [dim_of(found[0], axis) for axis in axes]
    values, clean = runner.record(found, keep_stream=True, pack=by_position(found, axes))
    replace = _make_replace(mode, values, rows, others, Runner(model, others, NoScore(), budget), seed)
    patches = patches_over(found, axes, values)
    numbers = sweep(runner, patches, replace, progress, sites)
    sizes = [values[found[0]].shape[dim] for dim in dims]
    table = numbers.T.reshape(len(rows), len(found), *sizes)
    labels: dict[str, Any] = {PAIR: tuple(range(len(rows))), "layer": tuple(site.layer for site in found)}
    for axis, size in zip(axes, sizes, strict=True):
        labels[axis] = rows.labels() if axis in ("pos", "key") else tuple(range(size))
    if not scorer.per_pair:
        del labels[PAIR]
        table, clean = table[0], clean[0]
    kind = mode if isinstance(mode, str) else "direction"
    return Result(table, labels, {"clean": clean}, scorer.name, f"{kind} ablation of {sites}")


def _make_replace(
    mode: Mode | torch.Tensor,
    values: dict[Any, torch.Tensor],
    rows: Prompts,
    others: Prompts,
    runner: Runner,
    seed: int,
) -> Replace:
    """What stands in the place of a part."""
    if isinstance(mode, torch.Tensor):
        return _project_out(mode)
    if mode == "zero":
        return lambda live, rows, site: torch.zeros_like(live)
    if mode not in ("mean", "resample"):
        raise errors.InputError(f"mode is 'zero', 'mean', 'resample' or a direction, not {mode!r}.")
    known = values if others is rows else runner.record(list(values))[0]
    if mode == "mean":
        means = {site: _mean(site, value, others) for site, value in known.items()}
        return lambda live, rows, site: means[site].expand(live.shape)
    drawn = _draw(rows, others, seed)
    return lambda live, rows, site: known[site][drawn[rows.cpu()].to(live.device)]


def _project_out(direction: torch.Tensor) -> Replace:
    if direction.dim() != 1 or not bool(direction.norm() > 0):
        raise errors.InputError(f"A direction is a vector other than zero, not of shape {list(direction.shape)}.")
    unit = direction / direction.norm()

    def replace(live: torch.Tensor, _rows: torch.Tensor, site: Any) -> torch.Tensor:
        if live.shape[-1] != len(unit):
            raise errors.InputError(f"The direction has {len(unit)} numbers, {site.name} has {live.shape[-1]}.")
        along = unit.to(live)
        return live - (live @ along)[..., None] * along

    return replace


def _mean(site: Any, value: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    """The average over all tokens of all prompts, `[1, 1, …]`."""
    if "query" in site.axes:
        raise errors.InputError(f"The mean of {site.name} depends on the prompts' lengths: use 'zero' or 'resample'.")
    return value[prompts.real().to(value.device)].mean(0)[None, None]


def _draw(rows: Prompts, others: Prompts, seed: int) -> torch.Tensor:
    """For each prompt another one `[prompt]` as long: never itself."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for i, row in enumerate(rows.rows):
        fitting = [
            j
            for j, other in enumerate(others.rows)
            if len(other) == len(row) and (others is not rows or j != i) and not torch.equal(other, row)
        ]
        if not fitting or others.length != rows.length:
            raise errors.InputError(
                f"Prompt {i} has no other prompt of {len(row)} tokens to resample from: give some as reference=[...]."
            )
        drawn.append(fitting[int(torch.randint(len(fitting), (), generator=generator))])
    return torch.tensor(drawn)
