"""collect_activations: what a model computes at some places, for many prompts, written to disk as it comes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nnsight import NNsight, errors

from ._corpus import Positions, Prompt, batches, check_positions, digest, encode_prompts
from ._places import find_places
from ._progress import progress_bar
from ._reader import Reader
from ._shards import FORMAT, ROWS, clear_unfinished, read_manifest, write_manifest, write_shard
from ._store import ActivationStore

_AT_ONCE = 512  # prompts that are encoded together
_MOST_PROMPTS = 8192  # of a shard


def collect_activations(
    model: NNsight,
    prompts: Iterable[Any],
    sites: Any,
    *,
    to: str | os.PathLike[str],
    positions: Positions = "all",
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    shard_bytes: int = 256 * 2**20,
    progress: bool = True,
) -> ActivationStore:
    """Run a model over many prompts and write what it computes at some places to a folder.

    The folder gets shards (safetensors) and a manifest (JSON). Each is there as a whole or not at all: a run that was
    killed is taken up by the same call, and leaves the same files as one that was not. Memory holds one shard, however
    many prompts there are. The forward ends behind the last place.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import collect_activations
        >>> model = LanguageModel("nnsight/landmarks")
        >>> prompts = ["The Eiffel Tower is in", "The Colosseum is in the city of"]
        >>> store = collect_activations(model, prompts, ["resid_pre[3]"], to="acts", positions="last", progress=False)
        >>> len(store), store["resid_pre[3]"].shape[1] == model.config.n_embd
        (2, True)

    Args:
        model: The model; its stored edits are in force.
        prompts: Texts, token ids, or rows of a dataset with `text` or `input_ids`; any iterable that gives the same prompts
            in the same order each time.
        sites: Places whose values are `[batch, pos, …]`: a name (`"resid_pre[3]"`, `("resid_pre", 3)`, `model.site(…)`), a
            path (`"transformer.h.3.mlp"`, `"transformer.h.3.mlp.input"`), an envoy, or a list of these.
        to: The folder; made if it is not there.
        positions: `"all"`, `"last"`, positions such as `[0, -1]`, or a function from a prompt's token ids to its positions.
        dtype: What to store; by default as computed.
        max_length: Cut prompts to so many tokens.
        batch_tokens: Tokens of one forward. A prompt shares its forward with others of about its length.
        shard_bytes: Activations of one shard, about; a shard has at most 8,192 prompts.
        progress: Show a progress bar.

    Returns:
        The store, one row for each position of each prompt, in the order of the prompts.

    Raises:
        InputError: A prompt, or what was given for the rest, cannot be used; or the folder holds other activations.
        RowsError: A place's values are not `[batch, pos, …]`.
    """
    folder = Path(to)
    chosen = check_positions(positions)
    source = _Source(prompts)
    first = source.first()
    if hasattr(model, "dispatch"):
        model.dispatch()
    tokenizer = _tokenizer(model)
    probe = encode_prompts(tokenizer, [first], 0, "all", max_length)[0].ids
    reader = Reader(model, find_places(model, sites), probe)
    settings = {
        "model": fingerprint(model),
        "sites": {key: {"axes": list(axes), "shape": list(shape), "dtype": str(dtype or kept).removeprefix("torch.")}
                  for key, axes, shape, kept in reader.columns},
        "positions": chosen,
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "shard_bytes": shard_bytes,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _open(folder, settings)
    source.skip(manifest["shards"], complete=manifest["complete"])
    if not manifest["complete"]:
        limit = max(shard_bytes // reader.row_bytes(dtype), 1)
        collection = _Collection(reader, folder, manifest, dtype, batch_tokens)
        total: Any = source.count  # None where it is not known, which tqdm takes
        with progress_bar(total, "collecting", progress) as bar:
            bar.update(source.taken)
            for raw, encoded in _shards(source, tokenizer, positions, max_length, limit):
                collection.add(raw, encoded)
                bar.update(len(raw))
        manifest["complete"] = True
        write_manifest(folder, manifest)
    return ActivationStore(folder)


class _Source:
    """The prompts, each taken once; what a store has already is compared with what it was made of."""

    def __init__(self, prompts: Iterable[Any]) -> None:
        if isinstance(prompts, str):
            prompts = [prompts]
        self.count = len(prompts) if hasattr(prompts, "__len__") else None  # pyright: ignore[reportArgumentType]
        self.taken = 0
        self._items = iter(prompts)
        self._ahead: list[Any] = []

    def first(self) -> Any:
        self._ahead = list(islice(self._items, 1))
        if not self._ahead:
            raise errors.InputError("There are no prompts to collect activations of.")
        return self._ahead[0]

    def take(self, count: int) -> list[Any]:
        found = self._ahead[:count]
        self._ahead = self._ahead[count:]
        found += islice(self._items, count - len(found))
        self.taken += len(found)
        return found

    def give_back(self, items: list[Any]) -> None:
        self._ahead = items + self._ahead
        self.taken -= len(items)

    def skip(self, shards: Sequence[dict[str, Any]], *, complete: bool) -> None:
        for shard in shards:
            if digest(self.take(shard["prompts"])) != shard["digest"]:
                raise errors.InputError(f"{shard['file']} was made of other prompts. {_ELSEWHERE}")
        if complete and (more := self.take(1)):
            raise errors.InputError(
                f"The store is complete with {self.taken - len(more)} prompts, and here are more. {_ELSEWHERE}"
            )


def _shards(
    source: _Source, tokenizer: Any, positions: Positions, max_length: int | None, limit: int
) -> Iterator[tuple[list[Any], list[Prompt]]]:
    """Prompts that make a shard of at most `limit` rows (or of one prompt): as given, and encoded."""
    while True:
        raw: list[Any] = []
        encoded: list[Prompt] = []
        rows = 0
        start = source.taken
        while len(raw) < _MOST_PROMPTS and rows < limit:
            more = source.take(min(_AT_ONCE, _MOST_PROMPTS - len(raw)))
            if not more:
                break
            found = encode_prompts(tokenizer, more, start + len(raw), positions, max_length)
            fitting = _count_fitting(found, limit - rows, empty=not raw)
            source.give_back(more[fitting:])
            raw += more[:fitting]
            encoded += found[:fitting]
            rows += sum(len(prompt.chosen) for prompt in found[:fitting])
            if fitting < len(more):
                break
        if not raw:
            return
        yield raw, encoded


def _count_fitting(prompts: Sequence[Prompt], room: int, *, empty: bool) -> int:
    used = 0
    for i, prompt in enumerate(prompts):
        used += len(prompt.chosen)
        if used > room and (i or not empty):
            return i
    return len(prompts)


class _Collection:
    """A store that is being written."""

    def __init__(
        self, reader: Reader, folder: Path, manifest: dict[str, Any], dtype: torch.dtype | None, batch_tokens: int
    ) -> None:
        self._reader = reader
        self._folder = folder
        self._manifest = manifest
        self._dtype = dtype
        self._batch_tokens = batch_tokens

    def add(self, raw: Sequence[Any], prompts: Sequence[Prompt]) -> None:
        """Compute and write one shard."""
        starts, rows = {}, 0
        for prompt in prompts:
            starts[prompt.number] = rows
            rows += len(prompt.chosen)
        tensors = {
            column.key: torch.empty(rows, *column.shape, dtype=self._dtype or column.dtype)
            for column in self._reader.columns
        }
        for batch in batches(prompts, self._batch_tokens, padded=self._reader.pads_left is not None):
            if not any(prompt.chosen for prompt in batch):
                continue
            values, _ = self._reader.read(batch)
            places = torch.cat([torch.arange(starts[p.number], starts[p.number] + len(p.chosen)) for p in batch])
            for key, value in values.items():
                tensors[key][places] = value.to(tensors[key])
        columns = (
            [p.number for p in prompts for _ in p.chosen],
            [position for p in prompts for position in p.chosen],
            [p.ids[position] for p in prompts for position in p.chosen],
        )
        tensors |= {name: torch.tensor(found, dtype=torch.long) for name, found in zip(ROWS, columns, strict=True)}
        shards = self._manifest["shards"]
        name = f"shard-{len(shards):05d}.safetensors"
        write_shard(self._folder, name, tensors)
        shards.append({"file": name, "prompts": len(prompts), "rows": rows, "digest": digest(raw)})
        write_manifest(self._folder, self._manifest)


def _open(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the folder, a new one where there is none."""
    found = read_manifest(folder)
    if found is None:
        if any(folder.glob("shard-*.safetensors")):
            raise errors.InputError(f"{folder} has shards, but no manifest that says what they are. {_ELSEWHERE}")
        found = {"format": FORMAT, **settings, "shards": [], "complete": False}
        write_manifest(folder, found)
    different = [name for name, value in settings.items() if found.get(name) != value]
    if different:
        told = ", ".join(f"{name} {found.get(name)!r} instead of {settings[name]!r}" for name in different)
        raise errors.InputError(f"{folder} holds other activations, with {told}. {_ELSEWHERE}")
    clear_unfinished(folder)
    return found


def fingerprint(model: NNsight) -> str:
    """Names, shapes and a few numbers of every parameter: two models with the same are taken to be one."""
    found = hashlib.sha256(type(model._model).__name__.encode())
    for name, parameter in model._model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(flat.numel() // 16, 1)][:16].to("cpu", torch.float64)
        found.update(f"{name} {list(parameter.shape)} {parameter.dtype} {sample.tolist()}".encode())
    return f"{type(model._model).__name__} {found.hexdigest()[:16]}"


def _tokenizer(model: Any) -> Any:
    try:
        return getattr(model, "tokenizer", None)
    except errors.LoadError:
        return None


_ELSEWHERE = "Choose another folder, or remove this one."
