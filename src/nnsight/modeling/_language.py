"""LanguageModel: a causal language model with its tokenizer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.nn import Module

from .._core import RESULT, Call, Override, Probe
from ..envoy import Envoy, present_plainly
from ..errors import NoInputError
from ..trace import Given, Prepared, Tracer
from ._base import NO_INPUT, NNsight
from ._elsewhere import open_elsewhere
from ._experts import gathered_experts
from ._generation import GENERATED, TOKEN, Generator, generate
from ._hidden import returns_tuple, show_block_output, take_block_output
from ._loading import Source
from ._outputs import show_causal_output
from ._pattern import PatternOnDemand
from ._probe import choose_rows, sample_tokens, select_rows, two_steps
from ._text import encode, given_values, is_plain_ids, make_batch, positions, split_options


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
        rename: Other names for modules, as for `NNsight`.
        envoys: Classes of your own to stand for modules, as for `NNsight`.
        **options: Passed to `from_pretrained`: `device_map`, `dtype`, `attn_implementation`, `revision`, ….

    Raises:
        LoadError: The model cannot be found or loaded.
    """

    _auto_class = "AutoModelForCausalLM"

    def __init__(
        self,
        model: str | Module,
        *,
        tokenizer: Any = None,
        dispatch: bool = False,
        rename: Mapping[str, str] | None = None,
        envoys: Mapping[type[Module] | str, type[Envoy]] | None = None,
        **options: Any,
    ) -> None:
        self._source: Source | None = None
        self._tokenizer = tokenizer
        self._has_own_tokenizer = tokenizer is not None
        self._pads: set[str] | None = None
        if isinstance(model, Module):
            super().__init__(model, rename=rename, envoys=envoys)
        else:
            self._source = Source(str(model), self._auto_class, options)
            super().__init__(self._source.build_empty(), rename=rename, envoys=envoys)
        tree = self._tree
        tree.present = _Presenter(self._module)
        tree.plain_tensors = False
        tree.accept = _accept
        tree.stand_in = _stand_in
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
        self._has_own_tokenizer = True

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
            **kwargs: Keyword arguments of the forward (`use_cache=False`) or the tokenizer (`add_special_tokens`);
                `remote=True`, `timeout=` (seconds), `blocking=False` and `backend="local-process"` run the block
                elsewhere, and load no weights here.

        Returns:
            A `Tracer` to use in a `with` statement, or with `trace=False` the model's output.

        Raises:
            NoInputError: The model was given no input.
            InputError: The input is nothing that a language model takes.
        """
        elsewhere = open_elsewhere(self, "trace", inputs, kwargs, strict_order=strict_order)
        if elsewhere is not None:
            return elsewhere
        self.dispatch()
        return super().trace(*inputs, trace=trace, strict_order=strict_order, **kwargs)

    def generate(self, *inputs: Any, trace: bool = True, strict_order: bool = False, **kwargs: Any) -> Any:
        """Generate from prompts, with a block that reads and changes what happens at each step.

        What the block asks for is of the first step, unless it iterates (`tracer.iter`, `tracer.all()`,
        `tracer.next()`).  Inside the block of a `trace()` with invokes, a call without prompt generates for those invokes and
        returns the result.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.generate("The Eiffel Tower is in", max_new_tokens=4) as tracer:
            ...     output = model.generator.output.save()
            >>> model.tokenizer.decode(output[0])
            'The Eiffel Tower is in the city of Paris'

        Args:
            *inputs: As for `trace`.
            trace: False generates plainly and returns what `generate` of transformers returns.
            strict_order: As for `trace`.
            **kwargs: Any option of transformers' `generate`: `max_new_tokens`, `do_sample`, `num_beams`, …; and
                `remote=True` and what goes with it, as for `trace`.

        Returns:
            A `Tracer`, or with `trace=False` the token ids `[batch, prompt + new tokens]`.
        """
        if not inputs and "input_ids" not in kwargs and "inputs" not in kwargs:
            collected = Tracer.current(self._tree)
            if collected is not None:
                collected.prepare_with(lambda givens: self._prepare_generation(givens, kwargs))
                return collected.result
        elsewhere = open_elsewhere(self, "generate", inputs, kwargs, strict_order=strict_order)
        if elsewhere is not None:
            return elsewhere
        self.dispatch()
        given = Given(inputs, {}) if inputs else self._named_input(kwargs)
        if not trace:
            return self._prepare_generation([given] if given else [], kwargs).call()
        return Tracer(
            self._tree,
            lambda givens: self._prepare_generation(givens, kwargs),
            given,
            edits=self._edits,
            strict_order=strict_order,
        )

    @property
    def generator(self) -> Generator:
        """The generation as a whole: `generator.output`, and `generator.streamer.output` token by token."""
        return Generator(self._tree)

    def _scan_overrides(self) -> dict[Module, Override]:
        return gathered_experts(self._module)

    # --- inputs ----------------------------------------------------------------------------------------------

    def _gives_input(self, kwargs: dict[str, Any]) -> bool:
        return "input_ids" in kwargs or "inputs_embeds" in kwargs

    def _named_input(self, kwargs: dict[str, Any]) -> Given | None:
        names = ("input_ids", "attention_mask", "inputs")
        named = {("input_ids" if n == "inputs" else n): kwargs.pop(n) for n in names if n in kwargs}
        return Given((named,), {}) if named else None

    def _prepare(self, givens: list[Given], kwargs: dict[str, Any]) -> Prepared:
        options, kwargs = split_options(kwargs)
        if "inputs_embeds" in kwargs:
            return Prepared(Call(self._module, (), kwargs, repeatable=True), [kwargs["inputs_embeds"].shape[0]])
        batch, sizes = self._encode(givens, kwargs, options)
        if self._has_encoder and "labels" not in kwargs:
            batch.setdefault("decoder_input_ids", self._decoder_start(batch["input_ids"]))
        call = Call(
            self._module, (), {**batch, **kwargs}, repeatable=True, probe=self._probe_batch(batch, sizes, kwargs)
        )
        return Prepared(call, sizes)

    def _prepare_generation(self, givens: list[Given], kwargs: dict[str, Any]) -> Prepared:
        options, kwargs = split_options(kwargs, generating=True)
        batch, sizes = self._encode(givens, kwargs, options)
        batch.pop("position_ids", None)  # `generate` makes them from the mask
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        kwargs.setdefault("pad_token_id", self._pad_id())
        inputs = {**batch, **kwargs, "module": self._module}
        probe = self._probe_batch(batch, sizes, kwargs, generating=True)
        call = Call(generate, (), inputs, repeatable=False, probe=probe, batch_first=(GENERATED, TOKEN, RESULT))
        return Prepared(call, sizes)

    def _encode(
        self, givens: list[Given], kwargs: dict[str, Any], options: dict[str, Any]
    ) -> tuple[dict[str, Any], list[int]]:
        named = {name: kwargs.pop(name) for name in ("input_ids", "attention_mask") if name in kwargs}
        if named and (not givens or givens == [Given((), {})]):
            givens = [Given((named,), {})]
        if not givens:
            raise NoInputError(NO_INPUT)
        if len(givens) == 1 and is_plain_ids(givens[0]):
            ids = givens[0].args[0]
            ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
            return {"input_ids": ids.to(self.device)}, [ids.shape[0]]
        encoded = [[encode(value, self._tokenizer_or_none(), options) for value in given_values(g)] for g in givens]
        sizes = [sum(len(e.rows) for e in group) for group in encoded]
        flat = [e for group in encoded for e in group]
        if len(flat) == 1 and flat[0].given is not None:
            return {name: self._to_device(value) for name, value in flat[0].given.items()}, sizes
        batch = make_batch(flat, self._pad_id(), pad_left=self._pads_left())
        if self._pads_left() and not batch["attention_mask"].all() and self._takes("position_ids"):
            batch["position_ids"] = positions(batch["attention_mask"])
        return {name: self._to_device(value) for name, value in batch.items()}, sizes

    def _probe_batch(
        self, batch: dict[str, Any], sizes: list[int], options: dict[str, Any], *, generating: bool = False
    ) -> Probe | None:
        if len(sizes) < 2:
            return None
        vocabulary = self._module.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
        samples = sample_tokens(batch, vocabulary, pad_left=self._pads_left())
        if self._has_encoder and not generating and "decoder_input_ids" not in options:
            samples["decoder_input_ids"] = samples["input_ids"][:, :3]
        function = cast(Any, self._module).generate if generating else self._module
        options = two_steps(options, self._pad_id()) if generating else options
        places = choose_rows(sizes)

        def probe(rows: list[int]) -> Call:
            chosen = select_rows(options, [places[row] for row in rows], sum(sizes))
            inputs = {name: value[rows] for name, value in samples.items()}
            return Call(function, (), {**inputs, **chosen}, repeatable=False)

        return probe

    @property
    def _has_encoder(self) -> bool:
        return getattr(self._config, "is_encoder_decoder", False)

    @property
    def _config(self) -> Any:
        return getattr(self._module, "config", None)

    def _decoder_start(self, ids: torch.Tensor) -> torch.Tensor:
        start = getattr(self._config, "decoder_start_token_id", None)
        return torch.full((ids.shape[0], 1), self._pad_id() if start is None else start, device=ids.device)

    def _pads_left(self) -> bool:
        can_generate = getattr(self._module, "can_generate", lambda: False)()
        return can_generate and not self._has_encoder

    def _tokenizer_or_none(self) -> Any:
        return self._tokenizer if self._source is None else self.tokenizer

    def _to_device(self, value: Any) -> Any:
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
    return _is_block_class(type(module))


@functools.cache
def _is_block_class(kind: type) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return issubclass(kind, GradientCheckpointingLayer)


def _accept(module: Module, current: Any, assigned: Any) -> Any:
    return take_block_output(current, assigned) if is_block(module) else assigned


def _stand_in(module: Module, value: Any) -> Any:
    native = returns_tuple(type(module)) if is_block(module) else None
    return value if native is None else take_block_output((None,) if native else _NO_TENSOR, value)


_NO_TENSOR = torch.empty(0)
