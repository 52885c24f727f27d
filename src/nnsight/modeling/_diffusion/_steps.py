"""Denoising steps: where one begins, and how often the batch stands in what the denoiser is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..._core import Place, current_pass
from ._pipeline import Pipeline, denoisers

STEP_BEGINS = Place("a denoising step")


class Denoising:
    """One call of a pipeline.

    A step begins with the first call of a denoiser after the last step was over, which the pipeline's own callback
    tells; where it has none, every call of the denoiser is a step.  `groups` is how often the batch of `images` stands one
    after the other in the denoiser's input: twice under classifier-free guidance.  `twin` is to run in the pipeline's place.
    """

    def __init__(self, root: Pipeline, images: int, twin: Any = None) -> None:
        self._root = root
        self._images = images
        self._twin = twin
        self._pipeline: Any = None
        self._pass: Any = None
        self._between = True
        self._tells = False
        self._begun = 0
        self.groups = 1

    def __call__(self, **inputs: Any) -> Any:
        """Run the pipeline."""
        slots = vars(self._root)
        own = slots["_pipeline"]
        pipeline = self._pipeline = slots["_pipeline"] = self._twin or own
        self._between, self._begun, self._pass = True, 0, current_pass()
        self._tells = "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters
        if self._tells:
            inputs["callback_on_step_end"] = _with_end(inputs.get("callback_on_step_end"), self._end)
        handles: list[RemovableHandle] = []
        for module in denoisers(pipeline):
            handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            if not self._tells:
                handles.append(module.register_forward_hook(lambda *_: self._end()))
        try:
            return self._root(**inputs)
        finally:
            slots["_pipeline"] = own
            self._pipeline = self._pass = None
            for handle in handles:
                handle.remove()

    def _begin(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = current_pass()
        if current is None or current is not self._pass or not self._between:
            return  # nobody's, or another's: a trial in the middle of this run
        self._between = False
        self._begun += 1
        sample = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if sample is not None and sample.dim() and not sample.shape[0] % self._images:
            self.groups = sample.shape[0] // self._images
        current.call(STEP_BEGINS, _nothing, (), {})

    def _end(self) -> None:
        current = current_pass()
        if current is None or current is not self._pass:
            return
        self._between = True
        count = getattr(self._pipeline, "_num_timesteps", None) or len(
            getattr(self._pipeline.scheduler, "timesteps", ())
        )
        if self._begun >= count:
            current.end_steps()


def _with_end(callback: Any, end: Callable[[], None]) -> Any:
    if callback is None:
        return _Callback(end)
    if hasattr(callback, "tensor_inputs"):  # an object of diffusers, which names the tensors it wants
        both = _Callback(end, callback)
        both.tensor_inputs = callback.tensor_inputs  # type: ignore[attr-defined]
        return both
    return _Callback(end, callback)


class _Callback:
    """The user's callback, if there is one, and the end of the step."""

    def __init__(self, end: Callable[[], None], callback: Callable[..., Any] | None = None) -> None:
        self._end = end
        self._callback = callback

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        self._end()
        return tensors if self._callback is None else self._callback(pipeline, step, timestep, tensors)


def _nothing() -> None:
    return None
