"""LanguageModel: a causal language model with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from ..envoy import Envoy
from ._needs import Needs
from ._transformers import TransformersModel


class LanguageModel(TransformersModel):
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
        auto_class: The class of transformers to load it with, for other models that take text: encoder-decoders
            (`"AutoModelForSeq2SeqLM"`), masked ones (`"AutoModelForMaskedLM"`).
        **options: Passed to `from_pretrained`: `device_map`, `dtype`, `attn_implementation`, `revision`, …; `peft`, an
            adapter's folder or name on the hub, gives the model its layers.

    Raises:
        LoadError: The model cannot be found or loaded.
    """

    _processor_class = "AutoTokenizer"

    def __init__(
        self,
        model: str | Module,
        *,
        tokenizer: Any = None,
        dispatch: bool = False,
        rename: Mapping[str, str] | None = None,
        envoys: Mapping[type[Module] | str, type[Envoy]] | None = None,
        auto_class: str = "AutoModelForCausalLM",
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            auto_class=auto_class,
            processor=tokenizer,
            dispatch=dispatch,
            rename=rename,
            envoys=envoys,
            **options,
        )

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; loaded when first asked for.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> model.tokenizer.decode(model.tokenizer("Hello").input_ids)
            'Hello'
        """
        return self.processor

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._processor = tokenizer
        self._has_own_processor = True

    def trace(
        self,
        *inputs: Any,
        trace: bool = True,
        strict_order: bool = False,
        stop_after_last: bool = False,
        **kwargs: Any,
    ) -> Any:
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
            stop_after_last: End the forward once the block's last request was served: what comes after is not run. The
                blocks of all invokes are waited for, and the modules named in `tracer.cache(modules=...)`; stored edits count
                up to there. A request for the result (`tracer.result`, `model.output`) is one for the whole forward.
            **kwargs: Keyword arguments of the forward (`use_cache=False`) or the tokenizer (`add_special_tokens`);
                `remote=True`, `timeout=` (seconds), `blocking=False` and `backend="local-process"` run the block
                elsewhere, and load no weights here.

        Returns:
            A `Tracer` to use in a `with` statement, or with `trace=False` the model's output.

        Raises:
            NoInputError: The model was given no input.
            InputError: The input is nothing that a language model takes.
        """
        options = {"strict_order": strict_order, "stop_after_last": stop_after_last}
        return super().trace(*inputs, trace=trace, **options, **kwargs)

    def _needs(self) -> Needs:
        return Needs(self._module, self._processor)
