"""Trial: a small forward of the model, beside whatever runs, on which the vocabulary is checked."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import Module
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._core import (
    Call,
    Fakes,
    Instruments,
    Run,
    Worker,
    capture_modes,
    plain_modes,
    preserved_attributes,
    preserved_buffers,
    preserved_random_state,
    switch_modes,
)
from ..errors import NamesError

_LENGTH = 5  # tokens


class _WithoutDropout(TorchFunctionMode):
    """In training mode too, a sum adds up."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.dropout:
            return args[0] if args else kwargs["input"]
        if function is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return function(*args, **kwargs)


@contextmanager
def trial(instruments: Instruments, inputs: dict[str, torch.Tensor], fakes: Fakes | None) -> Iterator[Worker]:
    """A forward of its own, whose values the worker may read; nothing of it is left behind.

    With `fakes`, those of a scan, it computes shapes.
    """
    root = instruments.root
    call = Call(root if fakes is None else functools.partial(fakes.call, root), (), inputs, repeatable=False, fake=True)
    run = Run(instruments, root, lambda: call, strict=True)
    run.fakes = fakes
    if fakes is not None:
        run.overrides.update(fakes.overrides)
    run.modes = plain_modes() if fakes is not None else plain_modes(_WithoutDropout())
    worker = Worker(run, "the check of the vocabulary")
    run.add(worker)
    with _undisturbed(root) if fakes is None else nullcontext():
        worker.enter(sys._getframe(2))
        try:
            yield worker
        finally:
            worker.finished = True
            worker.leave()
            run.close()


@contextmanager
def _undisturbed(root: Module) -> Iterator[None]:
    before = capture_modes()
    switch_modes(before, plain_modes())
    try:
        with preserved_attributes(root), preserved_buffers(root), preserved_random_state():
            yield
    finally:
        switch_modes(capture_modes(), before)


def trial_inputs(model: Module, config: Any) -> dict[str, torch.Tensor]:
    """A small input of a model, from its config."""
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None or first.is_meta else first.device
    dtype = torch.float32 if first is None or not first.is_floating_point() else first.dtype
    name = getattr(type(model), "main_input_name", "input_ids")
    inputs: dict[str, torch.Tensor] = {}
    if name == "pixel_values" or config.model_type == "clip":
        inputs["pixel_values"] = _pixels(getattr(config, "vision_config", config))
    if name == "input_features":
        inputs[name] = torch.rand(1, config.num_mel_bins, 2 * config.max_source_positions)
    if name == "input_ids":
        inputs[name] = _ids(config)
    if not inputs:
        raise NamesError(f"no trial input is known for a model that is called with {name}")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _ids(config)[:, :-1]
    return {name: _filled(value, dtype).to(device) for name, value in inputs.items()}


def _filled(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    return torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _ids(config: Any) -> torch.Tensor:
    text = getattr(config, "text_config", None) or config
    special = {getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")}
    special |= {getattr(config, f"{name}_token_id", None) for name in ("image", "video")}
    vocabulary = int(text.vocab_size)
    usable = (i for i in range(min(vocabulary, 3), vocabulary) if i not in special)
    return torch.tensor([[i for i, _ in zip(usable, range(_LENGTH), strict=False)]])


def _pixels(config: Any) -> torch.Tensor:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, getattr(config, "num_channels", 3), height, width)
