"""TransformersModel: a Hugging Face model of any task, with its processor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch.nn import Module

from .._core import RESULT, Call, Override, Probe
from ..envoy import Envoy
from ..errors import InputError, NoInputError
from ..trace import Given, Prepared, Tracer
from ._adapters import set_merged, unwrapped
from ._base import NO_INPUT, NNsight, check_block
from ._elsewhere import open_elsewhere
from ._encodings import MASKS, Encoded, join
from ._experts import gathered_experts
from ._generation import GENERATED, TOKEN, Generator, generate, stepper_of
from ._loading import Source, refuse_options
from ._needs import Needs
from ._pattern import PatternOnDemand
from ._present import Presenter, accept, stand_in
from ._probe import choose_rows, select_rows, two_steps
from ._processors import RAW, Reader, part_of, split_options
from ._tasks import classes_for

Kind = TypeVar("Kind", bound="TransformersModel")


class Batch(NamedTuple):
    """The inputs of all invokes: arguments of the forward, and the parts they are made of."""

    inputs: dict[str, Any]
    groups: list[list[Encoded]]
    parts: list[Encoded]

    @property
    def sizes(self) -> list[int]:
        """The rows of each invoke."""
        return [sum(part.rows for part in group) for group in self.groups]

    @property
    def attached(self) -> list[dict[str, int]]:
        """What each invoke has attached to its rows, and how much of it."""
        counts = [Counter[str]() for _ in self.groups]
        for count, group in zip(counts, self.groups, strict=True):
            for part in group:
                count.update(part.units)
        return [dict(count) for count in counts]

    @property
    def is_padded(self) -> bool:
        """Whether some rows are shorter than others."""
        mask = self.inputs.get("attention_mask")
        return isinstance(mask, torch.Tensor) and (mask.is_meta or not bool(mask.all()))

    @property
    def is_even(self) -> bool:
        """Whether every row has one of everything that is attached to any."""
        return all(count == part.rows for part in self.parts for count in part.units.values())


class TransformersModel(NNsight):
    """A Hugging Face model of any task: classification, masked language, encoders, vision, audio, several at once.

    Inputs go through the model's own processor (tokenizer, image processor, feature extractor or all of them).
    Nothing is loaded but the config until the first trace, or `dispatch=True`: until then the modules are on the
    meta device, so that paths and shapes are there at once.

    Example:
        >>> import transformers
        >>> from nnsight import TransformersModel
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> config = transformers.BertConfig(**sizes, vocab_size=100, num_labels=3)
        >>> model = TransformersModel(transformers.BertForSequenceClassification(config).eval())
        >>> with model.trace([5, 6, 7, 8]):
        ...     hidden = model.bert.encoder.layer[0].output.save()
        ...     logits = model.output.logits.save()
        >>> hidden.shape, logits.shape
        (torch.Size([1, 4, 32]), torch.Size([1, 3]))

    Args:
        model: A name on the hub, a local folder, or a module of your own, which is used as it stands.
        task: What the model is for, by the names of transformers' pipelines: `"text-classification"`, `"fill-mask"`,
            `"image-classification"`, `"automatic-speech-recognition"`, …. It chooses the class to load; by default
            that which the model was saved from.
        auto_class: The class of transformers to load instead: `"AutoModelForTokenClassification"`, `"BertModel"`, ….
        processor: A processor, tokenizer, image processor or feature extractor of your own; by default the model's.
        dispatch: Load the weights now.
        rename: Other names for modules, as for `NNsight`.
        envoys: Classes of your own to stand for modules, as for `NNsight`.
        **options: Passed to `from_pretrained`: `device_map`, `dtype`, `attn_implementation`, `revision`, …; `peft`, an
            adapter's folder or name on the hub, gives the model its layers.

    Raises:
        LoadError: The model cannot be found or loaded, or is not of this task.
        InputError: There is no such task.
    """

    _processor_class = "AutoProcessor"

    def __init__(
        self,
        model: str | Module,
        *,
        task: str | None = None,
        auto_class: str | None = None,
        processor: Any = None,
        dispatch: bool = False,
        rename: Mapping[str, str] | None = None,
        envoys: Mapping[type[Module] | str, type[Envoy]] | None = None,
        **options: Any,
    ) -> None:
        self._source: Source | None = None
        self._processor = processor
        self._has_own_processor = processor is not None
        if isinstance(model, Module):
            refuse_options({**options, "task": task} if task else options)
            super().__init__(model, rename=rename, envoys=envoys)
        else:
            self._source = Source(str(model), classes_for(task, auto_class), options)
            super().__init__(self._source.build_empty(), rename=rename, envoys=envoys)
        tree = self._tree
        self._describe()
        tree.plain_tensors = False
        tree.accept = accept
        tree.stand_in = stand_in
        tree.before_request = PatternOnDemand()
        self.dispatched = self._source is None
        if dispatch:
            self.dispatch()

    @property
    def processor(self) -> Any:
        """What makes tensors of text, images or audio; loaded when first asked for.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> model.processor("The capital of France is")["input_ids"]
            [304, 360, 296, 570, 283]
        """
        if self._processor is None and self._source is not None:
            self._processor = self._source.load_processor(self._processor_class)
        return self._processor

    @processor.setter
    def processor(self, processor: Any) -> None:
        self._processor = processor
        self._has_own_processor = True

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, None where it has none.

        Example:
            >>> from nnsight import TransformersModel
            >>> model = TransformersModel("nnsight/landmarks")
            >>> model.tokenizer.decode([570, 283])
            ' France is'
        """
        return part_of(self.processor, "text")

    def dispatch(self: Kind) -> Kind:
        """Load the weights, if they are not there yet; envoys taken before stay valid.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> head = model.lm_head
            >>> head.weight.device, model.dispatch().lm_head is head, head.weight.device
            (device(type='meta'), True, device(type='cpu'))
        """
        if not self.dispatched:
            assert self._source is not None
            self._take(self._source.load())
            self._describe()
        return self

    def _describe(self) -> None:
        """Tell the tree what is to be known of the module."""
        self._tree.present = Presenter(self._module)
        self._tree.stepper = stepper_of(self._module)

    def merge_adapter(self: Kind) -> Kind:
        """Add the weights of the adapters (PEFT) to the layers that they adapt; their own layers do not run any more.

        Example:
            >>> import peft, transformers
            >>> from nnsight import LanguageModel
            >>> net = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2))
            >>> lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
            >>> model = LanguageModel(peft.get_peft_model(net.eval(), lora))
            >>> before = model.trace([1, 2, 3], trace=False).logits
            >>> after = model.merge_adapter().trace([1, 2, 3], trace=False).logits
            >>> bool((before - after).abs().max() < 1e-5)
            True

        Raises:
            InputError: The model has no adapter.
        """
        set_merged(self.dispatch()._module, True)
        return self

    def unmerge_adapter(self: Kind) -> Kind:
        """Undo `merge_adapter`.

        Example:
            >>> import peft, torch, transformers
            >>> from nnsight import LanguageModel
            >>> net = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2))
            >>> lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
            >>> model = LanguageModel(peft.get_peft_model(net.eval(), lora))
            >>> weight = model.base_model.model.transformer.h[0].attn.c_attn.base_layer.weight
            >>> before = weight.clone()
            >>> model.merge_adapter().unmerge_adapter() is model, torch.allclose(weight, before)
            (True, True)
        """
        set_merged(self.dispatch()._module, False)
        return self

    def trace(
        self,
        *inputs: Any,
        trace: bool = True,
        strict_order: bool = False,
        stop_after_last: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model once, with a block that reads and changes what happens inside.

        Example:
            >>> import torch, transformers
            >>> from nnsight import TransformersModel
            >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            >>> config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
            >>> model = TransformersModel(transformers.ViTModel(config).eval())
            >>> with model.trace(torch.rand(1, 3, 16, 16)):
            ...     hidden = model.output.last_hidden_state.save()
            >>> hidden.shape
            torch.Size([1, 5, 32])

        Args:
            *inputs: What the processor takes (text, PIL images, arrays with an image or a sound, chat messages, or lists
                of these), token ids, an encoding, or the model's own tensors. Floating-point tensors are taken as they
                stand. An input of several sorts is named (`text=..., images=...`) or given side by side.
            trace: False calls the model plainly and returns its output.
            strict_order: Make reading a place that has passed an error; otherwise a second forward pass serves it.
            stop_after_last: End the forward once the block's last request was served: what comes after is not run. The
                blocks of all invokes are waited for, and the modules named in `tracer.cache(modules=...)`; stored edits count
                up to there. A request for the result (`tracer.result`, `model.output`) is one for the whole forward.
            **kwargs: Keyword arguments of the forward (`pixel_values=…`, `labels=…`), or options of the processor:
                `add_special_tokens`, `truncation`, `max_length`, `add_generation_prompt`, `sampling_rate` (in Hz; by
                default the one that the model was trained on).

        Returns:
            A `Tracer` to use in a `with` statement, or with `trace=False` the model's output.

        Raises:
            NoInputError: The model was given no input.
            InputError: The input is nothing that the model takes, or several inputs do not make a batch.
        """
        elsewhere = open_elsewhere(self, "trace", inputs, kwargs, strict_order, stop_after_last)
        if elsewhere is not None:
            return elsewhere
        self.dispatch()
        options = {"strict_order": strict_order, "stop_after_last": stop_after_last}
        return super().trace(*inputs, trace=trace, **options, **kwargs)

    def generate(
        self,
        *inputs: Any,
        trace: bool = True,
        strict_order: bool = False,
        stop_after_last: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate from inputs, with a block that reads and changes what happens at each step.

        What the block asks for is of the first step, unless it iterates (`tracer.iter`, `tracer.all()`,
        `tracer.next()`).  Inside the block of a `trace()` with invokes, a call without input generates for those invokes and
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
            stop_after_last: End the generation once the block's last request was served, in the middle of a step if need be; a
                request for what was generated (`model.generator.output`, `tracer.result`), or any `tracer.cache()`, is one
                for all of it.
            **kwargs: Any option of transformers' `generate`: `max_new_tokens`, `do_sample`, `num_beams`, …; and
                `remote=True` and what goes with it, as for `trace`.

        Returns:
            A `Tracer`, or with `trace=False` the token ids `[batch, prompt + new tokens]`.
        """
        elsewhere = open_elsewhere(self, "generate", inputs, kwargs, strict_order, stop_after_last)
        if elsewhere is not None:
            return elsewhere
        given = self._take_given(inputs, kwargs)
        if given is None:
            collected = Tracer._current(self._tree)
            if collected is not None:
                if stop_after_last:
                    raise InputError(
                        "This call generates for the invokes of the trace around it, and asks for the result: "
                        "stop_after_last=True belongs to a generation with a block of its own."
                    )
                collected._prepare_with(lambda givens: self._prepare_generation(givens, kwargs))
                return collected.result
        self.dispatch()
        if not trace:
            check_block(stop_after_last)
            return self._prepare_generation([given] if given else [], kwargs).call()
        return Tracer(
            self._tree,
            lambda givens: self._prepare_generation(givens, kwargs),
            given,
            edits=self._edits,
            strict_order=strict_order,
            stop_after_last=stop_after_last,
        )

    @property
    def generator(self) -> Generator:
        """The generation as a whole: `generator.output`, and `generator.streamer.output` token by token.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.generate("The Eiffel Tower is in", max_new_tokens=3) as tracer:
            ...     tokens = [model.generator.streamer.output for step in tracer.iter[:]]
            ...     ids = model.generator.output.save()
            >>> [int(token) for token in tokens] == ids[0, -3:].tolist()
            True
        """
        return Generator(self._tree)

    def _scan_overrides(self) -> dict[Module, Override]:
        return {**super()._scan_overrides(), **gathered_experts(self._module)}

    # --- inputs ----------------------------------------------------------------------------------------------

    def _needs(self) -> Needs:
        return Needs(self._module, part_of(self._processor, "text"))

    def _take_given(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
        main = self._needs().main
        names = {main, "inputs_embeds", MASKS.get(main), *RAW}
        if "inputs" in kwargs:  # as `generate` of transformers calls its main input
            kwargs[main] = kwargs.pop("inputs")
        named = {name: kwargs.pop(name) for name in [*kwargs] if name in names}
        return Given(inputs, named) if inputs or named else None

    def _prepare(self, givens: list[Given], kwargs: dict[str, Any]) -> Prepared:
        options, kwargs = split_options(kwargs)
        batch = self._encode(givens, options)
        inputs = self._needs().complete(batch.inputs, kwargs, padded=len(batch.parts) > 1 and batch.is_padded)
        call = Call(self._module, (), {**inputs, **kwargs}, repeatable=True, probe=self._probe_batch(batch, kwargs))
        return Prepared(call, batch.sizes, batch.attached)

    def _prepare_generation(self, givens: list[Given], kwargs: dict[str, Any]) -> Prepared:
        options, kwargs = split_options(kwargs, generating=True)
        batch = self._encode(givens, options)
        needs, inputs = self._needs(), batch.inputs
        if needs.main == "input_ids" and "input_ids" in inputs:
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        if stepper_of(self._module) is unwrapped(self._module):  # else what generates inside is given its own
            kwargs.setdefault("pad_token_id", needs.pad_id)
        call = Call(
            generate,
            (),
            {**needs.place(inputs), **kwargs, "module": self._module},
            repeatable=False,
            probe=self._probe_batch(batch, kwargs, generating=True),
            batch_first=(GENERATED, TOKEN, RESULT),
        )
        return Prepared(call, batch.sizes, batch.attached)

    def _encode(self, givens: list[Given], options: dict[str, Any]) -> Batch:
        if not givens:
            raise NoInputError(NO_INPUT)
        needs = self._needs()
        reader = Reader(needs.main, lambda: self.processor, lambda: self.tokenizer, options, pad_left=needs.pads_left)
        groups = [reader.read(given) for given in givens]
        parts = [part for group in groups for part in group]
        if not parts:
            raise NoInputError(NO_INPUT)
        return Batch(join(parts, self._needs().padding()), groups, parts)  # the tokenizer may be loaded now

    def _probe_batch(self, batch: Batch, options: dict[str, Any], *, generating: bool = False) -> Probe | None:
        if len(batch.sizes) < 2:
            return None
        needs, total = self._needs(), sum(batch.sizes)
        sampler = needs.sampler(batch.parts, padded=batch.is_padded)
        function = cast(Any, self._module).generate if generating else self._module
        options = two_steps(function, options, sampler.token, needs.pad_id) if generating else options
        places = choose_rows(batch.sizes)

        def make(rows: list[int]) -> Call:
            chosen = select_rows(options, [places[max(row, ~row)] for row in rows], total)
            inputs = sampler.rows(rows)
            if needs.starts_decoder and not generating and "decoder_input_ids" not in options:
                inputs["decoder_input_ids"] = sampler.decoder_ids(rows)
            inputs = needs.complete(inputs, options, padded=batch.is_padded and not generating)
            return Call(function, (), {**inputs, **chosen}, repeatable=False)

        return Probe(make, sampler.units, optional=batch.is_even)
