"""Path patching: what goes from one part of a model to another without detours."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nnsight import LanguageModel, errors

from ._groups import Group, Part, Row
from ._metrics import Metric
from ._patching import Direction, Over, PairRuns, axes_of
from ._progress import progress_bar
from ._prompts import encode_pair
from ._result import Result
from ._runner import Runner
from ._sweep import Patch, dim_of, patches_over, put, sites_of

Values = dict[Any, torch.Tensor]
Receiver = tuple[str, int] | tuple[str, int, int]

# Values that an attention, or an MLP, makes on its way to its output.
_OF_ATTENTION = ("head_q", "head_k", "head_v", "head_q_rot", "head_k_rot", "head_pattern", "head_z", "head_result")
_OWN_OUTPUT = {**dict.fromkeys(_OF_ATTENTION, "attn_out"), "neurons": "mlp_out"}


def path_patching(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Any,
    senders: str = "head_z",
    receivers: str | Sequence[Receiver] = "logits",
    over: Over = ("layer", "head"),
    *,
    freeze_mlps: bool = False,
    direction: Direction = "noise",
    layers: Sequence[int] | None = None,
    memory: int | str = "1GB",
    progress: bool = True,
) -> Result:
    """Patch each sender, and let the change reach the receivers on direct paths only (Wang et al. 2022).

    A first run has the sender's value from the other prompt, and every later attention (with `freeze_mlps`, every later MLP
    too) gives what it gives without; what the receivers are given there is put into a second run, which is measured.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import logit_diff, path_patching
        >>> model = LanguageModel("nnsight/landmarks")
        >>> direct = path_patching(
        ...     model,
        ...     "The Eiffel Tower is in the city of",
        ...     "The Colosseum is in the city of",
        ...     logit_diff(" Paris", " Rome"),
        ...     receivers="logits",
        ...     progress=False,
        ... )
        >>> list(direct.axes)
        ['layer', 'head']

    Args:
        model: The model.
        clean: As for `activation_patching`.
        corrupted: As for `activation_patching`.
        metric: As for `activation_patching`.
        senders: A value of the vocabulary, patched at every place of `over`.
        receivers: `"logits"`, or values `(name, layer)` or `(name, layer, head)`, as `("head_q", 9, 6)`; a sender behind all
            of them reaches none.
        over: What a sender is, as for `activation_patching`.
        freeze_mlps: Whether paths through later MLPs count as detours.
        direction: `noise`: into the clean run; or `denoise`.
        layers: Some layers of senders only.
        memory: As for `activation_patching`.
        progress: Show a progress bar.

    Returns:
        As `activation_patching`.

    Raises:
        InputError: As for `activation_patching`, or a receiver is none.
    """
    axes = axes_of(over)
    first, second = encode_pair(model, clean, corrupted)
    runs = PairRuns(model, first, second, metric, direction, memory)
    found = sites_of(model, senders, layers)
    dims = [dim_of(found[0], axis) for axis in axes]
    source = runs.record(found)
    outputs = ["attn_out", "mlp_out"] if freeze_mlps else ["attn_out"]
    base, _ = runs.base.record([site for name in outputs for site in sites_of(model, name)])
    paths = _Paths(runs.base, source, base, _receivers(model, receivers))
    patches = patches_over(found, axes, source)
    groups = [list(group) for _, group in itertools.groupby(patches, lambda patch: patch.site)]
    with progress_bar(len(patches) * len(first), "paths", progress) as bar, torch.no_grad():
        numbers = runs.base.run((paths.group(group) for group in groups), bar.update)
    numbers = numbers.view(len(patches), len(first))
    runs.leave_out_padding(numbers, patches)
    sizes = [source[found[0]].shape[dim] for dim in dims]
    table = numbers.T.reshape(1, len(first), len(found), *sizes)
    goal = receivers if isinstance(receivers, str) else ", ".join(" ".join(map(str, one)) for one in receivers)
    title = f"path patching ({direction}) from {senders} to {goal}"
    return runs.result(table, [senders], True, runs.labels(found, axes, sizes), title)


def _receivers(model: LanguageModel, receivers: str | Sequence[Receiver]) -> list[Patch]:
    """The receivers in the order in which a model comes to them."""
    if isinstance(receivers, str):
        if receivers != "logits":
            raise errors.InputError(f"receivers are 'logits', or pairs such as ('head_q', 9), not {receivers!r}.")
        return [Patch(model.site("resid_post", len(model.names.layers) - 1))]
    found = []
    for name, layer, *heads in receivers:
        site = model.site(name, layer)
        dim = dim_of(site, "head") if heads else 0
        found.append(Patch(site, tuple((dim, head) for head in heads)))
    if not found:
        raise errors.InputError("There are no receivers.")
    return sorted(found, key=lambda patch: patch.site.order)


class _Paths:
    """Both runs of each sender."""

    def __init__(self, runner: Runner, source: Values, base: Values, receivers: Sequence[Patch]) -> None:
        self._runner = runner
        self._source = source
        self._base = base
        self._receivers = receivers

    def group(self, senders: Sequence[Patch]) -> Group:
        """The second runs of senders at one site, which start at the first receiver that they reach."""
        site = senders[0].site
        reached = [patch for patch in self._receivers if patch.site.order > site.order]
        if site.name == "resid_post" and site == self._receivers[-1].site:
            reached = [self._receivers[-1]]
        rows: list[Row] = list(itertools.product(senders, range(len(self._runner.prompts))))

        def edit(batch: Sequence[Patch], prompts: torch.Tensor, _: Part | None) -> Callable[[], None]:
            given = self._given(site, batch, prompts, reached)
            return lambda: self._give(given, reached)

        start = min((patch.site.layer for patch in reached), default=self._runner.layers - 1)
        return Group(rows, start, edit)

    def _given(self, site: Any, senders: Sequence[Patch], prompts: torch.Tensor, reached: Sequence[Patch]) -> Values:
        """What the receivers are given in a run with these senders, one a row."""
        if not reached:
            return {}
        wanted = {patch.site for patch in reached}
        frozen = {one for one in self._base if _is_detour(one, site)}

        def act() -> Values:
            values = {}
            put(site, senders, prompts, lambda live, rows, _: self._source[site][rows])
            last = max(one.order for one in wanted)
            for one in sorted({*wanted, *frozen}, key=lambda one: one.order):
                if one.order > last:
                    break
                if one in frozen:
                    one.write(self._base[one][prompts])
                if one in wanted:
                    values[one] = one.read().clone()
            return values

        return self._runner.observe(prompts.tolist(), site.layer, act)

    def _give(self, given: Values, reached: Sequence[Patch]) -> None:
        """Put them into the second run."""
        for site, patches in itertools.groupby(reached, lambda patch: patch.site):
            live = site.read()
            new = live.clone()
            for patch in patches:
                index: list[Any] = [slice(None)] * live.dim()
                for dim, place in patch.index:
                    index[dim] = place
                new[tuple(index)] = given[site][tuple(index)]
            site.write(new)


def _is_detour(output: Any, sender: Any) -> bool:
    """Whether an attention's or MLP's output is on no direct path from the sender."""
    own = output.layer == sender.layer and _OWN_OUTPUT.get(sender.name) == output.name
    return output.order > sender.order and not own
