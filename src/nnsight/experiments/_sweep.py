"""Sweeps: many small edits of the same prompts, each a row of a batch that starts at the layer it touches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nnsight import LanguageModel, errors

from ._groups import Group, Part
from ._progress import progress_bar
from ._runner import Runner

# Values [row, pos, …] of which a position is computed from itself alone, and from what attention sees of those before it.
_BY_POSITION = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_q", "head_z", "neurons")
_BEFORE_MLP = ("resid_pre", "attn_out", "head_q", "head_k", "head_v", "head_pattern", "head_z", "head_result")

# What a user calls an axis -> what the vocabulary calls it, in any of its values.
AXES = {"pos": ("pos", "query"), "head": ("head",), "neuron": ("d_mlp",), "key": ("key",)}

_ENOUGH = 96  # positions in a batch: of fewer, a matrix product takes about as long

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
        patches: What to patch.
        replace: What to put there.
        progress: Show a progress bar.
        title: Of the progress bar.
    """
    count = len(runner.prompts)
    order = sorted(range(len(patches)), key=lambda number: patches[number].site.order)
    groups = _groups(runner, [patches[number] for number in order])
    with progress_bar(len(patches) * count, title, progress) as bar, torch.no_grad():
        numbers = runner.run((_group_of(runner, group, replace) for group in groups), bar.update)
    found = torch.empty_like(numbers.view(len(patches), count))
    found[order] = numbers.view(len(patches), count)
    return found


def by_position(sites: Sequence[Any], axes: Sequence[str]) -> bool:
    """Whether patches over these axes each begin at a position, before which they change nothing in a causal model."""
    return "pos" in axes and all(site.name in _BY_POSITION for site in sites)


def _groups(runner: Runner, patches: Sequence[Patch]) -> list[list[Patch]]:
    """Patches that are run together: those of a site, and of the next ones while a batch of them is small."""
    found: list[list[Patch]] = []
    places = 0
    for _, some in itertools.groupby(patches, lambda patch: patch.site):
        group = list(some)
        if found and places < _ENOUGH:
            found[-1] += group
        else:
            found.append(group)
            places = 0
        places += _places(runner, group) * len(runner.prompts)
    return found


def _places(runner: Runner, patches: Sequence[Patch]) -> int:
    """How many positions of a prompt a run with these patches computes."""
    length = runner.prompts.length
    if runner.packing is None or not _has_position(patches[0]):
        return length * len(patches)
    return sum(length - _position_of(patch) for patch in patches)


def _group_of(runner: Runner, patches: Sequence[Patch], replace: Replace) -> Group:
    """The rows (patch, prompt) of a few sites, in the order in which the model comes by."""
    places = {patch.site: _place_of(runner, patch.site) for patch in patches}
    sites = dict(sorted(places.items(), key=lambda pair: pair[1].order))

    def edit(batch: Sequence[Patch], prompts: torch.Tensor, part: Part | None) -> Callable[[], None]:
        def act() -> None:
            for site, place in sites.items():
                mine = [patch.site == site for patch in batch]
                if any(mine):
                    put(place, batch, prompts, lambda live, rows, _, site=site: replace(live, rows, site), mine, part)

        return act

    rows = list(itertools.product(patches, range(len(runner.prompts))))
    layers = [place.layer or 0 for place in sites.values()]
    ends = [place for place in sites.values() if place.layer == runner.layers - 1]
    early = all(place.name in _BEFORE_MLP for place in ends)
    first = _position_of if all(_has_position(patch) for patch in patches) else None
    return Group(rows, min(layers), edit, before_mlp=early, first=first, last=max(layers))


def _has_position(patch: Patch) -> bool:
    return patch.site.name in _BY_POSITION and any(dim == 1 for dim, _ in patch.index)


def _position_of(patch: Patch) -> int:
    return next(place for dim, place in patch.index if dim == 1)


def _place_of(runner: Runner, site: Any) -> Any:
    """Where to patch a site's value: what leaves a layer is what enters the next, where the run can start."""
    if site.name == "resid_post" and runner.stream is not None and site.layer + 1 < runner.layers:
        return runner.model.site("resid_pre", site.layer + 1)
    return site


def put(
    site: Any,
    patches: Sequence[Patch],
    prompts: torch.Tensor,
    replace: Replace,
    mine: Sequence[bool] | None = None,
    part: Part | None = None,
) -> None:
    """Put new values at a site, in a trace: those of patch `i` in row `i`.

    Args:
        site: Where.
        patches: One for each row.
        prompts: The number of each row's prompt.
        replace: What to put there.
        mine: Which of the rows are meant, by default all.
        part: What of the value is the rows', by default all.
    """
    whole = site.read()
    live = whole if part is None else part.unpack(whole)
    new = replace(live, prompts.to(live.device), site).to(live)
    if patches[0].index or not all(mine or [True]):
        new = torch.where(mask_of(live, patches, mine), new, live)
    site.write(new if part is None else part.put(whole, new))


def mask_of(live: torch.Tensor, patches: Sequence[Patch], mine: Sequence[bool] | None = None) -> torch.Tensor:
    """Where each row's patch is, in a shape that broadcasts to the value's; nowhere in a row that is not meant."""
    mask = torch.tensor([True] * len(patches) if mine is None else mine, device=live.device)
    mask = mask.view([-1] + [1] * (live.dim() - 1))
    for number in range(len(patches[0].index)):
        dim = patches[0].index[number][0]
        places = torch.tensor([patch.index[number][1] for patch in patches], device=live.device)
        there = places[:, None] == torch.arange(live.shape[dim], device=live.device)
        shape = [1] * live.dim()
        shape[0], shape[dim] = there.shape
        mask = mask & there.view(shape)
    return mask
