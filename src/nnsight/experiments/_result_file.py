"""Result files: one safetensors file, with what is no tensor as JSON in its header."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file

from nnsight import errors

if TYPE_CHECKING:
    from ._result import Result

_FORMAT = "nnsight-result"
_VERSION = 1


def write_file(path: str | os.PathLike[str], result: Result) -> None:
    """Write `result` to `path`."""
    tensors = {"values": result.values.contiguous()}
    tensors |= {f"baseline.{name}": value.contiguous() for name, value in result.baseline.items()}
    about = {
        "version": _VERSION,
        "axes": [[name, list(labels)] for name, labels in result.axes.items()],
        "baseline": list(result.baseline),
        "name": result.name,
        "title": result.title,
        "texts": None if result.texts is None else list(result.texts),
        "details": dict(result.details),
    }
    save_file({name: value.clone() for name, value in tensors.items()}, path, {_FORMAT: json.dumps(about)})


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of the result in `path`."""
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get(_FORMAT)
        if header is None:
            raise errors.InputError(f"{os.fspath(path)} is no result that Result.save wrote.")
        about = json.loads(header)
        if about["version"] > _VERSION:
            raise errors.InputError(f"{os.fspath(path)} was written by a newer nnsight: update this one.")
        return {
            "values": file.get_tensor("values"),
            "axes": {name: tuple(labels) for name, labels in about["axes"]},
            "baseline": {name: file.get_tensor(f"baseline.{name}") for name in about["baseline"]},
            "name": about["name"],
            "title": about["title"],
            "texts": None if about["texts"] is None else tuple(about["texts"]),
            "details": about["details"],
        }
