"""Activation patching: what of one run, put into another, brings its answer with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from nnsight import LanguageModel, errors

from ._memory import Budget
from ._metrics import Metric, Scorer
from ._prompts import Prompts, encode_pair, pair_labels
from ._result import PAIR, Result
from ._runner import Runner
from ._sweep import Patch, by_position, dim_of, patches_over, sites_of, sweep

Direction = Literal["denoise", "noise"]
Over = str | Sequence[str]


def activation_patching(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Any,
    sites: str | Sequence[str] = "resid_pre",
    over: Over = ("layer", "pos"),
    *,
    direction: Direction = "denoise",
    layers: Sequence[int] | None = None,
    memory: int | str = "1GB",
    progress: bool = True,
) -> Result:
    """Put values of one run into another, one place at a time, and measure what that does (Meng et al. 2022).

    `denoise` runs the corrupted prompt with a clean value in it: what suffices to restore the answer. `noise` runs the clean
    prompt with a corrupted value in it: what is necessary (Heimersheim & Nanda 2024). The patches are rows of a few batches,
    each run from the layer that it touches, and give what a loop of single runs gives.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import activation_patching, logit_diff
        >>> model = LanguageModel("nnsight/landmarks")
        >>> effects = activation_patching(
        ...     model,
        ...     "The Eiffel Tower is in the city of",
        ...     "The Colosseum is in the city of",
        ...     logit_diff(" Paris", " Rome"),
        ...     progress=False,
        ... )
        >>> effects.best()["pos"], effects.select(layer=0).best()["pos"]      # late in the last token, early in the subject
        (' of', ' E/ Col')
        >>> figure = effects.normalized().plot()

    Args:
        model: The model.
        clean: A prompt, or a list of prompts: text or token ids.
        corrupted: As many prompts, each as long in tokens as its clean one.
        metric: `logit_diff(" Paris", " Rome")` and the like, or a function of the output, whose `.logits` are
            `[prompt, pos, vocab]`, to one number for each prompt.
        sites: A value of the vocabulary, or several: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`,
            `head_z`, `head_q`, `head_k`, `head_v`, `head_pattern`, `neurons`, ….
        over: What is patched at a time: `layer`, and of `pos`, `head`, `neuron` those that the value has; over what is not
            named, the value is patched as a whole.
        direction: `denoise` or `noise`.
        layers: Some layers only.
        memory: How much to use beside the model: bytes, or `"500MB"`, `"2GiB"`.
        progress: Show a progress bar.

    Returns:
        The metric with each patch, `[site, pair, layer, …]`; `site` is there with several sites, `pair` with lists of prompts.
        Its baseline is the metric without patches, `corrupted` and `clean`, so that `normalized()` is 0 at the corrupted
        run's and 1 at the clean run's. Positions that a shorter prompt does not have are NaN.

    Raises:
        InputError: The prompts do not line up, an answer is no single token, or the memory is too little.
        NamesError: The model has no such value.
    """
    axes = axes_of(over)
    first, second = encode_pair(model, clean, corrupted)
    runs = PairRuns(model, first, second, metric, direction, memory)
    names = [sites] if isinstance(sites, str) else list(sites)
    tables, labels = [], {}
    for name in names:
        table, labels = runs.patch(name, axes, layers, progress)
        tables.append(table)
    if len({table.shape for table in tables}) > 1:
        raise errors.InputError(f"{', '.join(names)} have different {' and '.join(axes)}: patch them one by one.")
    title = f"activation patching ({direction}) of {', '.join(names)}"
    return runs.result(torch.stack(tables), names, isinstance(sites, str), labels, title)


def axes_of(over: Over) -> list[str]:
    axes = [over] if isinstance(over, str) else list(over)
    if "layer" not in axes or len(set(axes)) != len(axes):
        raise errors.InputError(
            f"over names 'layer', and further axes once each, as in ('layer', 'pos'); not {over!r}."
        )
    axes.remove("layer")
    return axes


class PairRuns:
    """The runs of both prompts of each pair, and what is patched from one into the other."""

    def __init__(
        self, model: LanguageModel, clean: Prompts, corrupted: Prompts, metric: Any, direction: str, memory: int | str
    ) -> None:
        if direction not in ("denoise", "noise"):
            raise errors.InputError(f"direction is 'denoise' or 'noise', not {direction!r}.")
        self.model = model
        self.clean, self.corrupted = clean, corrupted
        self.scorer = Scorer(metric, model, clean)
        budget = Budget(memory)
        runners = [Runner(model, prompts, self.scorer, budget) for prompts in (clean, corrupted)]
        self.source, self.base = runners if direction == "denoise" else runners[::-1]
        self.baseline: dict[str, torch.Tensor] = {}
        self._runners = dict(zip(("clean", "corrupted"), runners, strict=True))

    def patch(
        self, name: str, axes: Sequence[str], layers: Sequence[int] | None, progress: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The metric `[pair, layer, …]` with each patch, and the labels of its axes."""
        sites = sites_of(self.model, name, layers)
        for axis in axes:
            dim_of(sites[0], axis)
        values = self.record(sites, pack=by_position(sites, axes))
        patches = patches_over(sites, axes, values)
        numbers = sweep(self.base, patches, lambda live, rows, site: values[site][rows], progress, name)
        self.leave_out_padding(numbers, patches)
        shape = [values[sites[0]].shape[dim_of(sites[0], axis)] for axis in axes]
        self.base.budget.release(list(values.values()))
        return numbers.T.reshape(len(self.clean), len(sites), *shape), self.labels(sites, axes, shape)

    def record(self, sites: Sequence[Any], pack: bool = False) -> dict[Any, torch.Tensor]:
        values: dict[Any, torch.Tensor] = {}
        for name, runner in self._runners.items():  # the clean one first: some metrics compare with it
            wanted = sites if runner is self.source else []
            if name in self.baseline and not wanted:
                continue
            keep = runner is self.base
            found, self.baseline[name] = runner.record(wanted, keep_stream=keep, pack=pack and keep)
            values |= found
        return values

    def leave_out_padding(self, numbers: torch.Tensor, patches: Sequence[Patch]) -> None:
        padding = ~self.clean.real()
        if not padding.any():
            return
        for i, patch in enumerate(patches):
            for dim, place in patch.index:
                if patch.site.axes[dim] in ("pos", "query", "key"):
                    numbers[i, padding[:, place]] = torch.nan

    def labels(self, sites: Sequence[Any], axes: Sequence[str], shape: Sequence[int]) -> dict[str, Any]:
        labels: dict[str, Any] = {"layer": tuple(site.layer for site in sites)}
        for axis, size in zip(axes, shape, strict=True):
            is_pos = axis in ("pos", "key")
            labels[axis] = pair_labels(self.clean, self.corrupted) if is_pos else tuple(range(size))
        return labels

    def result(
        self, values: torch.Tensor, names: Sequence[str], one_site: bool, labels: dict[str, Any], title: str
    ) -> Result:
        """Values `[site, pair, layer, …]` as a result."""
        axes: dict[str, Any] = {"site": tuple(names), PAIR: tuple(range(len(self.clean))), **labels}
        baseline = {name: self.baseline[name] for name in ("corrupted", "clean")}
        if not self.scorer.per_pair:
            del axes[PAIR]
            values, baseline = values[:, 0], {name: value[0] for name, value in baseline.items()}
        if one_site:
            del axes["site"]
            values = values[0]
        details = {"prompts": ["".join(tokens) for tokens in self.clean.tokens]}
        return Result(values, axes, baseline, self.scorer.name, title, details=details)
