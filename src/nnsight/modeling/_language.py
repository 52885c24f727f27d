"""LanguageModel: a causal language model with its tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.nn import Module

from .._core import Call
from ..envoy import present_plainly
from ..errors import NoInputError
from ..trace import Tracer
from ._base import NO_INPUT, NNsight
from ._hidden import show_block_output, take_block_output
from ._loading import Source
from ._outputs import show_causal_output
from ._pattern import PatternOnDemand
from ._text import encode, make_batch, positions, split_options


class LanguageModel(NNsight):
    """A Hugging Face causal language model, traced with text.

    Nothing is loaded but the config until the first trace, or `dispatch=True`: until then the modules are
    on the meta device, so that paths and shapes are there at once.

    Example:
        >>> from nnsight import LanguageModel
        >>> model = LanguageModel("nnsight/landmarks")
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     hidden = model.transformer.h[5].output[0].save()
        ...     logits = model.lm_head.output.save()
        >>> model.tokenizer.decode(logits[0, -1].argmax())
        ' Paris'

    Args:
        model: A name on the hub, a local folder, `"nnsight/landmarks"` (bundled), or a module of your own.
        tokenizer: A tokenizer of your own; by default the model's.
        dispatch: Load the weights now.
        **options: Passed to `from_pretrained`: `device_map`, `dtype`, `attn_implementation`, `revision`, ….

    Raises:
        LoadError: The model cannot be found or loaded.
    """

    _auto_class = "AutoModelForCausalLM"
    _pad_left = True

    def __init__(
        self, model: str | Module, *, tokenizer: Any = None, dispatch: bool = False, **options: Any
    ) -> None:
        self._source: Source | None = None
        self._tokenizer = tokenizer
        self._pads: set[str] | None = None
        if isinstance(model, Module):
            super().__init__(model)
        else:
            self._source = Source(str(model), self._auto_class, options)
            super().__init__(self._source.build_empty())
        tree = self._tree
        tree.present = _Presenter(self._module)
        tree.plain_tensors = False
        tree.accept = _accept
        tree.before_request = PatternOnDemand()
        self.dispatched = self._source is None
        if dispatch:
            self.dispatch()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; loaded when first asked for."""
        if self._tokenizer is None and self._source is not None:
            self._tokenizer = self._source.load_tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def dispatch(self) -> LanguageModel:
        """Load the weights, if they are not there yet; envoys taken before stay valid."""
        if not self.dispatched:
            assert self._source is not None
            self._rebind(self._source.load())
            self._tree.rebind(self._module)
            self._tree.present = _Presenter(self._module)
            self.dispatched = True
        return self

    def trace(self, *inputs: Any, trace: bool = True, strict_order: bool = False, **kwargs: Any) -> Any:
        """Run the model once on prompts, with a block that reads and changes what happens inside.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.trace("The Colosseum is in the city of"):
            ...     model.transformer.h[0].output[0][:, -1] = 0
            ...     logits = model.output.save()
            >>> logits.shape[0]
            1

        Args:
            *inputs: Text, a list of texts, chat messages, token ids `[seq]` or `[batch, seq]`, or an encoding. Texts of
                different lengths are padded on the left, with positions so that each row equals its own single run.
            trace: False calls the model plainly and returns its output.
            strict_order: Make reading a place that has passed an error; otherwise a second forward pass serves it.
            **kwargs: Keyword arguments of the forward (`use_cache=False`) or the tokenizer (`add_special_tokens`).

        Returns:
            A `Tracer` to use in a `with` statement, or with `trace=False` the model's output.

        Raises:
            NoInputError: The model was given no input.
            InputError: The input is nothing that a language model takes.
        """
        self.dispatch()
        return super().trace(*inputs, trace=trace, strict_order=strict_order, **kwargs)

    def _prepare_call(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        options, kwargs = split_options(kwargs)
        if "input_ids" in kwargs:
            inputs = (*inputs, {name: kwargs.pop(name) for name in ("input_ids", "attention_mask") if name in kwargs})
        if not inputs:
            if "inputs_embeds" in kwargs:
                return Call(self._module, (), kwargs, repeatable=True)
            raise NoInputError(NO_INPUT)
        return Call(self._module, (), {**self._encode(inputs, options), **kwargs}, repeatable=True)

    def _encode(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        encoded = [encode(value, self._tokenizer_or_none(), options) for value in inputs]
        if len(encoded) == 1 and encoded[0].given is not None:
            return {name: self._place(value) for name, value in encoded[0].given.items()}
        batch = make_batch(encoded, self._pad_id(), pad_left=self._pad_left)
        if self._pad_left and not batch["attention_mask"].all() and self._takes("position_ids"):
            batch["position_ids"] = positions(batch["attention_mask"])
        return {name: self._place(value) for name, value in batch.items()}

    def _tokenizer_or_none(self) -> Any:
        return self._tokenizer if self._source is None else self.tokenizer

    def _place(self, value: Any) -> Any:
        return value.to(self.device) if hasattr(value, "to") else value

    def _pad_id(self) -> int:
        candidates = (self._tokenizer, getattr(self._module, "config", None))
        for name in ("pad_token_id", "eos_token_id"):
            for owner in candidates:
                found = getattr(owner, name, None)
                if isinstance(found, int) and found >= 0:
                    return found
        return 0

    def _takes(self, name: str) -> bool:
        if self._pads is None:
            self._pads = set(inspect.signature(type(self._module).forward).parameters)
        return name in self._pads


class _Presenter:
    """Shows block outputs and the causal output in every spelling."""

    def __init__(self, root: Module) -> None:
        self._root = root

    def __call__(self, module: Module, value: Any, write: Callable[[Any], None]) -> Any:
        if is_block(module):
            return show_block_output(value, write)
        if module is self._root:
            return show_causal_output(value)
        return present_plainly(module, value, write)


def is_block(module: Module) -> bool:
    """Whether `module` is a decoder or encoder block of a Hugging Face model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def _accept(module: Module, current: Any, assigned: Any) -> Any:
    return take_block_output(current, assigned) if is_block(module) else assigned
