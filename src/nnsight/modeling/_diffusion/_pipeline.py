"""Pipelines: the modules of one as a tree, and where they come from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Module

from ...errors import LoadError
from .._loading import first_line, resolve

_DENOISERS = (
    "unet",
    "unet_2",
    "transformer",
    "transformer_2",
    "prior",
    "decoder",
    "controlnet",
    "dit",
    "motion_adapter",
)


class Pipeline(Module):
    """The root of the tree: the pipeline's modules by their names, and a call of the whole.

    Everything else that the pipeline has (`scheduler`, `tokenizer`) is an attribute.
    """

    def __init__(self, modules: Mapping[str, Module], pipeline: Any = None) -> None:
        super().__init__()
        for name, module in modules.items():
            self._modules[name] = module  # `add_module` would refuse nothing else and cost a hook
        self.__dict__["_pipeline"] = pipeline

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pipeline = self.__dict__.get("_pipeline")
            if pipeline is None or name.startswith("_"):
                raise
            return getattr(pipeline, name)

    def forward(self, **inputs: Any) -> Any:
        """Call the pipeline."""
        return self.__dict__["_pipeline"](**inputs)


def tree_of(pipeline: Any) -> Pipeline:
    """A loaded pipeline as a tree."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, Module)}
    return Pipeline(modules, pipeline)


def denoisers(pipeline: Any) -> list[Module]:
    """The modules that run once a step; the first call of any of them begins it."""
    found = [getattr(pipeline, name, None) for name in _DENOISERS]
    return [module for module in found if isinstance(module, Module)]


class PipelineSource:
    """Where a pipeline comes from: a name or folder, and the options of `DiffusionPipeline.from_pretrained`."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self._name = name
        self._location = resolve(name)
        self._options = options

    def build_empty(self) -> Pipeline:
        """The modules on the meta device, as far as their configs tell."""
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        known = ("revision", "token", "cache_dir", "local_files_only", "variant")
        options = {name: self._options[name] for name in known if name in self._options}
        try:
            index: Any = DiffusionPipeline.load_config(self._location, **options)
            with torch.device("meta"):
                parts = {name: self._build_part(name, entry, options) for name, entry in index.items()}
        except (OSError, ValueError, ImportError, AttributeError) as error:
            raise LoadError(_NOT_FOUND.format(name=self._name, reason=first_line(error))) from error
        return Pipeline({name: part.eval() for name, part in parts.items() if part is not None})

    def _build_part(self, name: str, entry: Any, options: dict[str, Any]) -> Module | None:
        if name.startswith("_") or not isinstance(entry, (list, tuple)) or None in entry:
            return None
        library, kind = entry
        if library not in ("diffusers", "transformers"):
            return None
        cls = getattr(importlib.import_module(library), kind, None)
        if not (isinstance(cls, type) and issubclass(cls, Module)):
            return None
        if library == "diffusers":
            return cls.from_config(cls.load_config(self._location, subfolder=name, **options))  # type: ignore[attr-defined]
        config = cls.config_class.from_pretrained(self._location, subfolder=name, **options)  # type: ignore[attr-defined]
        return cls._from_config(config)  # type: ignore[attr-defined]

    def load(self) -> Any:
        """The pipeline with its weights."""
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        try:
            return DiffusionPipeline.from_pretrained(self._location, **self._options)
        except OSError as error:
            raise LoadError(_NOT_FOUND.format(name=self._name, reason=first_line(error))) from error


_NOT_FOUND = """\
The pipeline {name!r} could not be loaded: {reason}
Give the name of a pipeline on the hub (with network, or in the local cache), a local folder, or a pipeline of your own \
(built or loaded as you like)."""
