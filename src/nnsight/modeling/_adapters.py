"""Adapters of PEFT: their layers in a model's own tree, loaded from a folder, and merged into what they adapt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.nn import Module

from ..errors import InputError, LoadError

_CONFIG = "adapter_config.json"


def base_of(folder: str) -> str | None:
    """The name of the model that a folder with an adapter alone is for."""
    path = Path(folder)
    if not (path / _CONFIG).is_file() or (path / "config.json").is_file():
        return None
    return json.loads((path / _CONFIG).read_text("utf-8")).get("base_model_name_or_path")


def add_empty(model: Module, adapter: str) -> None:
    """Give a model on the meta device the adapter's layers, without weights."""
    peft = _import()
    try:
        config = peft.PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise LoadError(_NOT_FOUND.format(name=adapter, reason=str(error).partition("\n")[0])) from error
    model.add_adapter(config)  # type: ignore[operator]


def load(model: Module, adapter: str) -> None:
    """Give a model the adapter's layers with their weights."""
    _import()
    try:
        model.load_adapter(adapter)  # type: ignore[operator]
    except OSError as error:
        raise LoadError(_NOT_FOUND.format(name=adapter, reason=str(error).partition("\n")[0])) from error


def unwrapped(module: Module) -> Module:
    """The model inside a wrapper of PEFT, which says what arguments the forward takes."""
    inner = getattr(module, "get_base_model", None)
    return inner() if callable(inner) else module  # type: ignore[return-value]


def set_merged(module: Module, merged: bool) -> None:
    """Add the adapters' weights to the layers they adapt, or take them out again."""
    layers = list(_layers(module))
    if not layers:
        raise InputError("This model has no adapter: load one with peft=..., or wrap a PeftModel.")
    for layer in layers:
        if merged and not layer.merged:
            layer.merge()
        elif not merged and layer.merged:
            layer.unmerge()


def _layers(module: Module) -> Iterator[Any]:
    tuners = _import().tuners.tuners_utils
    return (part for part in module.modules() if isinstance(part, tuners.BaseTunerLayer))


def _import() -> Any:
    try:
        import peft
    except ImportError as error:
        raise LoadError("Adapters need the peft package: pip install peft.") from error
    return peft


_NOT_FOUND = """\
The adapter {name!r} could not be loaded: {reason}
Give peft=… a local folder with an adapter_config.json, or the name of an adapter on the hub (with network, or in the local \
cache)."""
