"""Sweeps: many small edits of the same prompts, each a row of a batch that starts at the layer it touches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nnsight import LanguageModel, errors

from ._progress import progress_bar
from ._runner import Group, Runner

_BEFORE_MLP = ("resid_pre", "attn_out", "head_q", "head_k", "head_v", "head_pattern", "head_z", "head_result")

# What a user calls an axis -> what the vocabulary calls it, in any of its values.
AXES = {"pos": ("pos", "query"), "head": ("head",), "neuron": ("d_mlp",), "key": ("key",)}

Replace = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
"""From the live value `[row, …]`, the number of each row's prompt, and the site, to what is to stand there."""


@dataclass(frozen=True)
class Patch:
    """One edit: at a site, all of it or a part.

    Args:
        site: A value of the vocabulary.
        index: Pairs of a dimension of the value and a place in it.
    """

    site: Any
    index: tuple[tuple[int, int], ...] = ()


def sites_of(model: LanguageModel, name: str, layers: Sequence[int] | None = None) -> list[Any]:
    """The sites called `name` at these layers, by default at all that have one."""
    numbers = range(len(model.names.layers)) if layers is None else layers
    found, reason = [], None
    for number in numbers:
        try:
            found.append(model.site(name, number))
        except errors.NamesError as error:  # hybrid models: some layers have attention, some have not
            if layers is not None:
                raise
            reason = error
    if not found:
        raise reason or errors.InputError("No layers were given.")
    return found


def dim_of(site: Any, axis: str) -> int:
    """The dimension of a site's value that an axis counts.

    Raises:
        InputError: It has no such dimension.
    """
    for name in AXES.get(axis, ()):
        if name in site.axes:
            return site.axes.index(name)
    known = [name for name, spelled in AXES.items() if any(one in site.axes for one in spelled)]
    raise errors.InputError(f"{site.name} has no axis {axis!r}: over can be layer and {', '.join(known)}.")


def patches_over(sites: Sequence[Any], axes: Sequence[str], values: Mapping[Any, torch.Tensor]) -> list[Patch]:
    """A patch for each layer and each place on the axes, layer by layer."""
    found = []
    for site in sites:
        dims = [dim_of(site, axis) for axis in axes]
        places = itertools.product(*(range(values[site].shape[dim]) for dim in dims))
        found += [Patch(site, tuple(zip(dims, place, strict=True))) for place in places]
    return found


def sweep(runner: Runner, patches: Sequence[Patch], replace: Replace, progress: bool, title: str) -> torch.Tensor:
    """The metric `[patch, prompt]` with each patch alone.

    Args:
        runner: Of the prompts that are patched; it should have the stream.
        patches: What to patch; those of one site stand together.
        replace: What to put there.
        progress: Show a progress bar.
        title: Of the progress bar.
    """
    count = len(runner.prompts)
    groups = [list(group) for _, group in itertools.groupby(patches, lambda patch: patch.site)]
    with progress_bar(len(patches) * count, title, progress) as bar, torch.no_grad():
        numbers = runner.run((_group_of(runner, group, replace) for group in groups), bar.update)
    return numbers.view(len(patches), count)


def _group_of(runner: Runner, patches: Sequence[Patch], replace: Replace) -> Group:
    """The rows (patch, prompt) of one site."""
    site, place = patches[0].site, _place_of(runner, patches[0].site)

    def edit(batch: Sequence[Patch], prompts: torch.Tensor) -> Callable[[], None]:
        return lambda: put(place, batch, prompts, lambda live, rows, _: replace(live, rows, site))

    rows = list(itertools.product(patches, range(len(runner.prompts))))
    return Group(rows, place.layer or 0, edit, before_mlp=place.name in _BEFORE_MLP)


def _place_of(runner: Runner, site: Any) -> Any:
    """Where to patch a site's value: what leaves a layer is what enters the next, where the run can start."""
    if site.name == "resid_post" and runner.stream is not None and site.layer + 1 < runner.layers:
        return runner.model.site("resid_pre", site.layer + 1)
    return site


def put(site: Any, patches: Sequence[Patch], prompts: torch.Tensor, replace: Replace) -> None:
    """Put new values at a site, in a trace: those of patch `i` in row `i`."""
    live = site.read()
    new = replace(live, prompts.to(live.device), site).to(live)
    if any(patch.index for patch in patches):
        new = torch.where(mask_of(live, patches), new, live)
    site.write(new)


def mask_of(live: torch.Tensor, patches: Sequence[Patch]) -> torch.Tensor:
    """Where each row's patch is, in a shape that broadcasts to the value's."""
    mask = torch.ones([1] * live.dim(), dtype=torch.bool, device=live.device)
    for number in range(len(patches[0].index)):
        dim = patches[0].index[number][0]
        places = torch.tensor([patch.index[number][1] for patch in patches], device=live.device)
        there = places[:, None] == torch.arange(live.shape[dim], device=live.device)
        shape = [1] * live.dim()
        shape[0], shape[dim] = there.shape
        mask = mask & there.view(shape)
    return mask
