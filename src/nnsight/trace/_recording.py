"""Recording: fills a cache while the model runs, without standing still anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import Module

from .._core import INPUT, OUTPUT, Run, Worker, map_tensors, user_frame
from ..errors import EditError, NeverRanError, RowsError, SavedValueChangedWarning

if TYPE_CHECKING:
    from ..envoy import Tree

_MISSING: Any = object()


class Keep(NamedTuple):
    """What a cache keeps of each call, and how."""

    output: bool
    inputs: bool
    device: torch.device | str | None
    dtype: torch.dtype | None
    detach: bool
    copy: bool

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the model as it goes into the cache."""
        if self.detach and tensor.requires_grad:
            tensor = tensor.detach()
        if self.device is None and self.dtype is None and not self.copy:
            return tensor
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.to(device=self.device, dtype=dtype, copy=self.copy)


class CachedCall:
    """One call of a cached module; `step` is the step of the generation it belongs to (0 in a trace)."""

    __slots__ = ("_inputs", "_output", "_site", "step")

    def __init__(self, site: Site, output: Any, inputs: Any, step: int) -> None:
        self._site = site
        self._output = output
        self._inputs = inputs
        self.step = step

    @property
    def output(self) -> Any:
        """What the module returned, after all edits."""
        return self._site.show(_kept(self._output, self._site.path, "outputs"))

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the module was called with, after all edits: `(args, kwargs)`."""
        return _kept(self._inputs, self._site.path, "inputs")

    @property
    def input(self) -> Any:
        """The first argument the module was called with."""
        args, kwargs = self.inputs
        return args[0] if args else next(iter(kwargs.values()), None)

    def __repr__(self) -> str:
        return f"{self._site.path}, step {self.step}: {self.describe()}"

    def describe(self) -> str:
        """The shapes and dtypes of what was kept."""
        kept = (("inputs", self._inputs), ("output", self._output))
        return ", ".join(f"{name} {describe(value)}" for name, value in kept if value is not _MISSING)


class Site:
    """The recorder of one module."""

    def __init__(self, path: str, module: Module, recording: CacheRecording) -> None:
        self.path = path
        self.calls: list[CachedCall] = []
        self._module: Module | None = module
        self._recording: CacheRecording | None = recording
        self._begun: list[Any] = []

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        recording = self._recording
        if recording is not None and recording.keep.inputs:
            self._begun.append(recording.take(self._module, INPUT, (args, kwargs), index, self.path))

    def end(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        recording = self._recording
        if recording is None:
            return
        inputs = output = _MISSING
        if recording.keep.inputs:
            if not self._begun:
                self.begin(args, kwargs, index)
            inputs = self._begun.pop()
        if recording.keep.output:
            output = recording.take(self._module, OUTPUT, result, index, self.path)
        self.calls.append(CachedCall(self, output, inputs, recording.step()))

    def show(self, value: Any) -> Any:
        """An output in every spelling it has in a trace."""
        module, recording = self._module, self._recording
        return value if module is None or recording is None else recording.tree.present(module, value, _refuse)

    def close(self) -> None:
        """Give the outputs the form they are shown in, and let go of the model."""
        as_it_is = False
        for call in self.calls:
            value = call._output
            plain = type(value) is torch.Tensor
            if value is _MISSING or isinstance(value, RowsError) or (plain and as_it_is):
                continue
            call._output = self.show(value)
            as_it_is = as_it_is or (plain and call._output is value)
        self._module = self._recording = None
        self._begun.clear()


class CacheRecording:
    """The sites of one cache, and which tensors the model could still change."""

    def __init__(self, run: Run, worker: Worker, tree: Tree, modules: Mapping[str, Module], keep: Keep) -> None:
        self.tree = tree
        self.keep = keep
        self.recorders = {module: Site(path, module, self) for path, module in modules.items()}
        self._run: Run | None = run
        self._worker: Worker | None = worker
        self._live: list[tuple[torch.Tensor, int, str]] = []
        frame = user_frame()
        self._line = ("<unknown>", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)

    def step(self) -> int:
        """The step that the model is in."""
        main = self._run.main if self._run is not None else None
        return 0 if main is None else max(main.step, 0)

    def take(self, module: Module | None, kind: str, value: Any, index: int, path: str) -> Any:
        """The worker's part of a value as it goes into the cache; an error where it has no part."""
        worker = self._worker
        if worker is not None and worker.rows is not None:
            try:
                value = worker.run.part(worker, module, kind, value, index, f"{path}.{kind}")
            except RowsError as error:
                return error
        if type(value) is torch.Tensor:
            return self._keep(value, path)
        return map_tensors(lambda tensor: self._keep(tensor, path), value)

    def _keep(self, tensor: torch.Tensor, path: str) -> torch.Tensor:
        kept = self.keep.tensor(tensor)
        if not self.keep.copy and not kept.is_inference():
            self._live.append((kept, kept._version, path))
        return kept

    def finish(self) -> None:
        """Say which values the model, or an edit, changed in place after they were cached."""
        if self._run is not None and self._run.call is not None and self._run.call.fake:
            return
        changed = list(dict.fromkeys(path for tensor, version, path in self._live if tensor._version != version))
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            warnings.warn_explicit(
                f"the cached values of {', '.join(changed[:5])}{more} were changed in place later in the run, by the model "
                "or by an edit, and hold the changed numbers. To keep them as they were: tracer.cache(copy=True)",
                SavedValueChangedWarning,
                *self._line,
            )

    def close(self) -> None:
        """Let go of the run and the model."""
        for site in self.recorders.values():
            site.close()
        self.recorders = {}
        self._live.clear()
        self._run = self._worker = None


def describe(value: Any) -> str:
    """The shapes and dtypes in a value."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(describe(item) for item in value) + ("," if len(value) == 1 else "") + ")"
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def _kept(value: Any, path: str, what: str) -> Any:
    if value is _MISSING:
        raise NeverRanError(f"The cache has no {what} of {path}: ask for them with tracer.cache(include_{_OPTION[what]}=True).")
    if isinstance(value, RowsError):
        raise value
    return value


_OPTION = {"outputs": "output", "inputs": "inputs"}


def _refuse(_: Any) -> None:
    raise EditError("A cache is a record of what was: assign to the module's .output inside the trace instead.")
