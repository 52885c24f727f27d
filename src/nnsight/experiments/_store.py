"""ActivationStore: activations on disk, read by memory map."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from nnsight import errors

from ._shards import ROWS, read_manifest


class ActivationStore(Dataset[dict[str, torch.Tensor]]):
    """The activations that `collect_activations` wrote, one row for each position of each prompt.

    Rows are read from the disk when they are asked for; the operating system keeps what is read often. As a
    `torch.utils.data.Dataset`, row `i` is a dict of one tensor for each site and of `prompt`, `position` and `token`.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import ActivationStore, collect_activations
        >>> model = LanguageModel("nnsight/landmarks")
        >>> _ = collect_activations(model, ["The Colosseum is in"], ["mlp_out[0]"], to="colosseum", progress=False)
        >>> store = ActivationStore("colosseum")
        >>> store[0]["mlp_out[0]"].shape == store["mlp_out[0]"][0].shape
        True
        >>> [int(position) for position in store["position"]][:3]
        [0, 1, 2]

    Args:
        folder: Where the store is.

    Raises:
        LoadError: There is none, or a shard is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise errors.LoadError(f"{self.folder} is no store of activations: it has no manifest.")
        self.manifest: dict[str, Any] = manifest
        self._ends = list(accumulate(shard["rows"] for shard in manifest["shards"]))
        self._open: dict[int, dict[str, torch.Tensor]] = {}
        missing = [s["file"] for s in manifest["shards"] if not (self.folder / s["file"]).exists()]
        if missing:
            raise errors.LoadError(f"{self.folder} lacks {', '.join(missing)}.")

    @property
    def sites(self) -> tuple[str, ...]:
        """The keys of the places, in the order in which the model computes them."""
        return tuple(self.manifest["sites"])

    @property
    def complete(self) -> bool:
        """Whether all prompts are in it; a run that was killed has left it incomplete."""
        return self.manifest["complete"]

    @property
    def prompts(self) -> int:
        """How many prompts are in it."""
        return sum(shard["prompts"] for shard in self.manifest["shards"])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __repr__(self) -> str:
        sites = ", ".join(f"{key} {info['shape']} {info['dtype']}" for key, info in self.manifest["sites"].items())
        state = "" if self.complete else ", incomplete"
        return f"ActivationStore({str(self.folder)!r}: {len(self)} rows of {self.prompts} prompts{state}; {sites})"

    def __getitem__(self, index: Any) -> Any:
        """Row `index` as a dict of tensors; or the whole of one site, or of `prompt`, `position` or `token`, by name."""
        if isinstance(index, str):
            return self.read(index)
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"The store has {size} rows; there is none at {index}.")
        number, row = self._find(index % size)
        return {name: tensor[row].clone() for name, tensor in self._shard(number).items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Many rows at once, as a `DataLoader` asks for them."""
        found = self.rows(torch.as_tensor(indices))
        return [{name: tensor[i] for name, tensor in found.items()} for i in range(len(indices))]

    def read(self, name: str, indices: torch.Tensor | slice | None = None) -> torch.Tensor:
        """One site, or `prompt`, `position` or `token`, at some rows or at all: `[row, …]`, in memory.

        Raises:
            InputError: The store has no such site.
        """
        if indices is None or isinstance(indices, slice):
            start, stop, step = (indices or slice(None)).indices(len(self))
            if step == 1:
                return self._span(name, start, stop)
            indices = torch.arange(start, stop, step)
        return self.rows(indices, [name])[name]

    def rows(self, indices: torch.Tensor, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Some rows, in the order of `indices`, as one tensor `[row, …]` for each name."""
        names = (*self.sites, *ROWS) if names is None else [self._known(name) for name in names]
        indices = torch.as_tensor(indices, dtype=torch.long)
        if indices.numel() and not (-len(self) <= indices.min() and indices.max() < len(self)):
            raise IndexError(
                f"The store has {len(self)} rows; the indices run from {indices.min()} to {indices.max()}."
            )
        indices = indices % max(len(self), 1)
        shards = torch.searchsorted(torch.tensor(self._ends), indices, right=True)
        found = {name: self._empty(name, len(indices)) for name in names}
        for number in shards.unique().tolist():
            here = (shards == number).nonzero().squeeze(1)
            rows = indices[here] - (self._ends[number - 1] if number else 0)
            for name, tensor in found.items():
                tensor[here] = self._shard(number)[name][rows]
        return found

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """All rows in batches, as one tensor `[row, …]` for each name; shuffled, with a `seed`, in the same way each time.

        Args:
            size: Rows of a batch; the last one may have fewer.
            seed: Shuffle the rows of the whole store by this number.
        """
        order = None if seed is None else shuffle(len(self), seed)
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield self.rows(torch.arange(start, stop) if order is None else order[start:stop])

    def shuffled(self, seed: int) -> Shuffled:
        """The same rows as a dataset in another order, the same for the same seed."""
        return Shuffled(self, seed)

    def _find(self, row: int) -> tuple[int, int]:
        number = bisect.bisect_right(self._ends, row)
        return number, row - (self._ends[number - 1] if number else 0)

    def _span(self, name: str, start: int, stop: int) -> torch.Tensor:
        self._known(name)
        parts = []
        while start < stop:
            number, row = self._find(start)
            end = min(stop, self._ends[number])
            parts.append(self._shard(number)[name][row : row + end - start])
            start = end
        return torch.cat(parts) if parts else self._empty(name, 0)

    def _empty(self, name: str, rows: int) -> torch.Tensor:
        info = self.manifest["sites"].get(name, {"shape": [], "dtype": "int64"})
        return torch.empty(rows, *info["shape"], dtype=getattr(torch, info["dtype"]))

    def _known(self, name: str) -> str:
        if name not in self.manifest["sites"] and name not in ROWS:
            raise errors.InputError(f"The store has no {name!r}; it has {', '.join((*self.sites, *ROWS))}.")
        return name

    def _shard(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of one shard, mapped into memory."""
        found = self._open.get(number)
        if found is None:
            with safe_open(self.folder / self.manifest["shards"][number]["file"], framework="pt") as file:
                found = self._open[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each process maps the files itself


class Shuffled(Dataset[dict[str, torch.Tensor]]):
    """The rows of a store in an order that a seed decides.

    Args:
        store: The store.
        seed: Any whole number.
    """

    def __init__(self, store: ActivationStore, seed: int) -> None:
        self.store = store
        self.order = shuffle(len(store), seed)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.store[int(self.order[index])]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        return self.store.__getitems__(self.order[torch.as_tensor(indices)].tolist())


def shuffle(count: int, seed: int) -> torch.Tensor:
    """The numbers below `count` in an order that depends on `seed` alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
