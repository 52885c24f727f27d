"""Shards: the files of a store, each there as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nnsight import errors

MANIFEST = "manifest.json"
FORMAT = 1
ROWS = ("prompt", "position", "token")  # the columns that say what each row is
_UNFINISHED = ".unfinished"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a store, None where there is none.

    Raises:
        LoadError: It is of a later version, or no manifest.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        version = found["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise errors.LoadError(f"{path} is no manifest of a store of activations.") from error
    if version != FORMAT:
        raise errors.LoadError(f"{path} has format {version}; this version of nnsight reads {FORMAT}.")
    return found


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest; whoever reads it sees the old or the new one."""
    _replace(folder / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8"))


def write_shard(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write one shard, in full before it has its name."""

    def write(path: Path) -> None:
        save_file(tensors, path)
        path.chmod((folder / MANIFEST).stat().st_mode)  # safetensors lets only the owner read

    _replace(folder / name, write)


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed run was writing."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        path.unlink()


def _replace(path: Path, write: Any) -> None:
    unfinished = path.with_name(path.name + _UNFINISHED)
    write(unfinished)
    _sync(unfinished)
    os.replace(unfinished, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Let it reach the disk before anything that relies on it; where folders cannot be opened, the system sees to it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
