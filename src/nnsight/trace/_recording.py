"""Recording: fills a cache while the model runs, without standing still anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import Module

from .._core import INPUT, OUTPUT, Run, Worker, map_tensors, user_frame
from ..envoy import first_input
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

    @property
    def is_plain(self) -> bool:
        """Whether outputs go into the cache as they are, and nothing else does."""
        return self.output and not (self.inputs or self.copy) and self.device is None and self.dtype is None

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the model as it goes into the cache."""
        if self.detach and tensor.requires_grad:
            tensor = tensor.detach()
        if self.device is None and self.dtype is None and not self.copy:
            return tensor
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.to(device=self.device, dtype=dtype, copy=self.copy)


class CachedCall:
    """One call of a cached module; `step` is the step of the generation it belongs to (0 in a trace).

    Example:
        >>> from nnsight import LanguageModel
        >>> model = LanguageModel("nnsight/landmarks")
        >>> with model.generate("The Eiffel Tower is in", max_new_tokens=3) as tracer:
        ...     cache = tracer.cache(modules=[model.lm_head], include_inputs=True)
        >>> [call.step for call in cache["lm_head"].calls]
        [0, 1, 2]
    """

    __slots__ = ("_inputs", "_output", "_path", "step")

    def __init__(self, path: str, output: Any, inputs: Any, step: int) -> None:
        self._path = path
        self._output = output
        self._inputs = inputs
        self.step = step

    @property
    def output(self) -> Any:
        """What the module returned, after all edits.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.generate("The Eiffel Tower is in", max_new_tokens=3) as tracer:
            ...     cache = tracer.cache(modules=[model.lm_head], include_inputs=True)
            >>> cache["lm_head"].calls[2].output.shape[:2]
            torch.Size([1, 1])
        """
        return _kept(self._output, self._path, "output")

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the module was called with, after all edits: `(args, kwargs)`.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.generate("The Eiffel Tower is in", max_new_tokens=3) as tracer:
            ...     cache = tracer.cache(modules=[model.lm_head], include_inputs=True)
            >>> args, kwargs = cache["lm_head"].calls[2].inputs
            >>> len(args), kwargs
            (1, {})
        """
        return _kept(self._inputs, self._path, "inputs")

    @property
    def input(self) -> Any:
        """The first argument the module was called with.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.generate("The Eiffel Tower is in", max_new_tokens=3) as tracer:
            ...     cache = tracer.cache(modules=[model.lm_head], include_inputs=True)
            >>> cache["lm_head"].calls[2].input.shape[:2]
            torch.Size([1, 1])
        """
        return first_input(self.inputs, self._path)

    def __repr__(self) -> str:
        return f"{self._path}, step {self.step}: {self._describe()}"

    def _describe(self) -> str:
        kept = (("inputs", self._inputs), ("output", self._output))
        return ", ".join(f"{name} {describe(value)}" for name, value in kept if value is not _MISSING)


class Site:
    """The recorder of one module: for each of its calls an item in several lists, which costs least."""

    def __init__(self, path: str, module: Module, recording: CacheRecording) -> None:
        self.path = path
        self.steps: list[int] = []
        self._outputs: list[Any] = []
        self._inputs: list[Any] = []
        self._versions: list[int] = []  # of the outputs, while all of them are plain tensors
        self._module: Module | None = module
        self._recording: CacheRecording | None = recording
        self._plain = recording.keep.is_plain
        self._detach = recording.keep.detach

    @classmethod
    def of(cls, path: str, steps: list[int], outputs: list[Any], inputs: list[Any]) -> Site:
        """The recorder of a module that is not here, with what it has kept; nothing of a kind that it was not to keep."""
        site = object.__new__(cls)
        site.path, site.steps = path, steps
        site._outputs, site._inputs = outputs or [_MISSING] * len(steps), inputs
        site._versions, site._module, site._recording = [], None, None
        if len(site._outputs) != len(steps) or (inputs and len(inputs) != len(steps)):
            raise ValueError("as many values as calls belong to a module in a cache")
        return site

    # --- in the model's coroutine ---------------------------------------------------------------------------

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        recording = self._recording
        if recording is not None:
            inputs = recording.take(self._module, INPUT, (args, kwargs), index, self.path)
            recording.begun.append((self, index, inputs))

    def end(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int, step: int) -> None:
        recording = self._recording
        if recording is None:
            return
        if self._plain and type(result) is torch.Tensor and recording.worker.rows is None and not result.is_inference():
            if self._detach and result.requires_grad:
                result = result.detach()
            self._versions.append(result._version)
        else:
            self._plain = False
            if recording.keep.inputs:
                self._inputs.append(self._begun(recording, args, kwargs, index))
            result = (
                recording.take(self._module, OUTPUT, result, index, self.path) if recording.keep.output else _MISSING
            )
        self._outputs.append(result)
        self.steps.append(step)

    def _begun(self, recording: CacheRecording, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Any:
        begun = recording.begun
        while begun:
            site, number, inputs = begun.pop()  # calls that ended by an error are above
            if site is self and number == index:
                return inputs
        return recording.take(self._module, INPUT, (args, kwargs), index, self.path)

    # --- what was recorded ----------------------------------------------------------------------------------

    @property
    def calls(self) -> list[CachedCall]:
        """The calls so far."""
        inputs = self._inputs or [_MISSING] * len(self.steps)
        steps = [max(step, 0) for step in self.steps]
        return [CachedCall(self.path, *call) for call in zip(self._show(), inputs, steps, strict=True)]

    def kept(self) -> tuple[list[Any], list[Any]]:
        """The outputs and inputs of all calls; none where they were not to be kept."""
        outputs = self._show()
        return ([] if any(value is _MISSING for value in outputs) else outputs), self._inputs

    def has_changed(self) -> bool:
        """Whether an output was changed in place since it was recorded."""
        return [output._version for output in self._outputs[: len(self._versions)]] != self._versions

    def close(self) -> None:
        """Give the outputs the form they are shown in, and let go of the model."""
        self._outputs = self._show()
        self._versions.clear()
        self._module = self._recording = None

    def _show(self) -> list[Any]:
        """The outputs in every spelling they have in a trace."""
        module, recording = self._module, self._recording
        if module is None or recording is None or not self._outputs:
            return self._outputs
        present, first = recording.tree.present, self._outputs[0]
        if self._plain and present(module, first, _refuse) is first:
            return self._outputs
        return [
            value if value is _MISSING or isinstance(value, RowsError) else present(module, value, _refuse)
            for value in self._outputs
        ]


class CacheRecording:
    """The sites of one cache, and which tensors the model could still change."""

    def __init__(self, run: Run, worker: Worker, tree: Tree, modules: Mapping[str, Module], keep: Keep) -> None:
        self.tree = tree
        self.worker = worker
        self.keep = keep
        self.takes_inputs = keep.inputs
        self.begun: list[tuple[Site, int, Any]] = []
        self.recorders = {module: Site(path, module, self) for path, module in modules.items()}
        self._live: list[tuple[torch.Tensor, int, str]] = []
        frame = user_frame()
        self._line = ("<unknown>", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)

    def take(self, module: Module | None, kind: str, value: Any, index: int, path: str) -> Any:
        """The worker's part of a value as it goes into the cache; an error where it has no part."""
        worker = self.worker
        if worker.rows is not None:
            try:
                value = worker.run.part(worker, module, kind, value, index, f"{path}.{kind}")
            except RowsError as error:
                return error
        return map_tensors(lambda tensor: self._keep(tensor, path), value)

    def _keep(self, tensor: torch.Tensor, path: str) -> torch.Tensor:
        kept = self.keep.tensor(tensor)
        if not self.keep.copy and not kept.is_inference():
            self._live.append((kept, kept._version, path))
        return kept

    def finish(self) -> None:
        """Say which values the model, or an edit, changed in place after they were cached."""
        call = self.worker.run.call
        if call is not None and call.fake:
            return
        changed = [site.path for site in self.recorders.values() if site.has_changed()]
        changed += [path for tensor, version, path in self._live if tensor._version != version]
        if changed:
            changed = list(dict.fromkeys(changed))
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            warnings.warn_explicit(
                f"the cached values of {', '.join(changed[:5])}{more} were changed in place later in the run, "
                "by the model or by an edit, and hold the changed numbers. To keep them as they were: "
                "tracer.cache(copy=True)",
                SavedValueChangedWarning,
                *self._line,
            )

    def close(self) -> None:
        """Let go of the run and the model."""
        for site in self.recorders.values():
            site.close()
        self.recorders = {}
        self._live.clear()
        self.begun.clear()


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
        raise NeverRanError(
            f"The cache was not to keep {what} of {path}: ask for it with tracer.cache(include_{what}=True)."
        )
    if isinstance(value, RowsError):
        raise value
    return value


def _refuse(_: Any) -> None:
    raise EditError("A cache is a record of what was: assign to the module's .output inside the trace instead.")
