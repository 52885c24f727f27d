"""Files of an InterventionSpec: JSON for what is said, safetensors for the numbers; nothing in them is ever run."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nnsight import errors

FORMAT = 1
KIND = "nnsight.interventions"
_TEXT, _VALUES = "interventions.json", "values.safetensors"
_FIELDS = ("factor", "prompt", "positions", "rows", "heads", "steps")


def save_spec(spec: Any, folder: str | os.PathLike[str]) -> None:
    """Write a spec to a folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    said, values = [], {}
    for number, one in enumerate(spec):
        entry = {"site": one.site, "operation": one.operation}
        entry |= {name: getattr(one, name) for name in _FIELDS if getattr(one, name) is not None}
        if one.value is not None:
            entry["value"] = key = f"{number}.value"
            values[key] = one.value.detach().cpu().clone().contiguous()
        said.append(entry)
    (target / _VALUES).unlink(missing_ok=True)
    if values:
        save_file(values, target / _VALUES)
    found = {"kind": KIND, "format": FORMAT, "name": spec.name, "model": spec.model, "interventions": said}
    (target / _TEXT).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


def load_spec(folder: Any, kind: Any, options: dict[str, Any]) -> tuple[list[Any], dict[str, str]]:
    """The interventions of a folder or repository, and the rest.

    Raises:
        LoadError: There is none, or it is damaged, or of a later version.
    """
    path = Path(folder)
    if not path.is_dir() and isinstance(folder, str) and folder.count("/") == 1 and not folder.startswith((".", "/")):
        path = _download(folder, options)
    try:
        found = json.loads((path / _TEXT).read_text("utf-8"))
    except FileNotFoundError:
        raise errors.LoadError(f"{folder} has no {_TEXT}: it is no InterventionSpec.") from None
    except ValueError as error:
        raise errors.LoadError(f"{path / _TEXT} is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise errors.LoadError(f"{path / _TEXT} is no InterventionSpec.")
    if found.get("format") != FORMAT:
        raise errors.LoadError(f"{path} has format {found.get('format')!r}; this version of nnsight reads {FORMAT}.")
    try:
        values = load_file(path / _VALUES) if (path / _VALUES).exists() else {}
        made = [_make(entry, values, kind) for entry in found["interventions"]]
    except (SafetensorError, KeyError, TypeError, AttributeError, errors.InputError) as error:
        raise errors.LoadError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return made, {"name": str(found.get("name", "")), "model": str(found.get("model", ""))}


def push_spec(spec: Any, repository: str, options: dict[str, Any]) -> str:
    """Upload a spec to the hub."""
    from huggingface_hub import HfApi

    options = dict(options)
    api = HfApi(token=options.pop("token", None))
    api.create_repo(repository, private=options.pop("private", None), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_spec(spec, folder)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, **options))


def _make(entry: dict[str, Any], values: dict[str, Any], kind: Any) -> Any:
    known = {"site", "operation", "value", *_FIELDS}
    if unknown := entry.keys() - known:
        raise errors.InputError(f"an intervention has {', '.join(sorted(unknown))}, which this version does not know")
    value = values[entry["value"]] if "value" in entry else None
    if entry["operation"] == "trained" and value is not None:
        value.requires_grad_()
    rest = {name: entry[name] for name in _FIELDS if name in entry}
    return kind(entry["site"], entry["operation"], value=value, **rest)


def _download(repository: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[_TEXT, _VALUES], **options))
    except OSError as error:
        raise errors.LoadError(f"{repository} is neither a folder nor a repository that can be had: {error}") from error
