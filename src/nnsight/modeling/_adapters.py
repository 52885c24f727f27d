"""Adapters of PEFT: their layers in a model's own tree, loaded from a folder, and merged into what they adapt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.nn import Module

from ..errors import InputError, LoadError

_FILE_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only")


class Adapter:
    """An adapter's folder or name on the hub, with the options that say where its files are."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self._options = {key: options[key] for key in _FILE_OPTIONS if key in options}

    @classmethod
    def alone(cls, name: str, options: Mapping[str, Any]) -> tuple[Adapter, str] | None:
        """The adapter that is all there is at a model's place, and the name of the model it is for."""
        from transformers.utils.peft_utils import find_adapter_config_file

        adapter = cls(name, options)
        file = find_adapter_config_file(name, **adapter._options)
        base = json.loads(Path(file).read_text("utf-8")).get("base_model_name_or_path") if file else None
        return (adapter, base) if base else None

    def add_empty(self, model: Module) -> None:
        """Give a model on the meta device the adapter's layers, without weights."""
        peft = _import()
        try:
            config = peft.PeftConfig.from_pretrained(self.name, **self._options)
        except (OSError, ValueError) as error:
            raise LoadError(_NOT_FOUND.format(name=self.name, reason=_first_line(error))) from error
        try:
            model.add_adapter(config)  # type: ignore[operator]
        except ValueError as error:
            raise self._misfit(model, _first_line(error)) from error

    def load(self, model: Module) -> None:
        """Give a model the adapter's layers with their weights."""
        _import()
        try:
            info = model.load_adapter(self.name, adapter_kwargs=self._options)  # type: ignore[operator]
        except OSError as error:
            raise LoadError(_NOT_FOUND.format(name=self.name, reason=_first_line(error))) from error
        except (ValueError, RuntimeError) as error:
            raise self._misfit(model, _first_line(error)) from error
        missing = sorted(info.missing_keys)
        if missing:
            raise self._misfit(model, f"it has no weights for {', '.join(missing[:3])} ({len(missing)} in all)")

    def _misfit(self, model: Module, reason: str) -> LoadError:
        return LoadError(_MISFIT.format(name=self.name, model=type(model).__name__, reason=reason.rstrip(".")))


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


_MISFIT = """\
The adapter {name!r} does not fit this {model}: {reason}. Its adapter_config.json names the model that it is for \
(base_model_name_or_path)."""

_NOT_FOUND = """\
The adapter {name!r} could not be loaded: {reason}
Give peft=… a local folder with an adapter_config.json, or the name of an adapter on the hub (with network, or in the local \
cache)."""
