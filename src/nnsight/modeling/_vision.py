"""VisionLanguageModel: a language model that sees images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from ..envoy import Envoy
from ._transformers import TransformersModel


class VisionLanguageModel(TransformersModel):
    """A Hugging Face model of text and images (LLaVA, Qwen-VL, …), traced and generated from with both.

    Each input is a text with as many of the processor's image placeholders as it has images, or chat messages that
    hold them.  Several invokes make one batch, whatever images each has: a block sees the tokens of its own text and, inside
    the vision model, its own images only.

    Nothing is loaded but the config until the first trace, or `dispatch=True`.

    Example:
        >>> import torch, transformers
        >>> from nnsight import VisionLanguageModel
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
        >>> text = transformers.LlamaConfig(**sizes, vocab_size=100)
        >>> config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=99)
        >>> model = VisionLanguageModel(transformers.LlavaForConditionalGeneration(config).eval())
        >>> encoding = {"input_ids": [[1, 99, 99, 99, 99, 5]], "pixel_values": torch.rand(1, 3, 16, 16)}
        >>> with model.trace(encoding):
        ...     image = model.model.multi_modal_projector.output.save()
        ...     logits = model.lm_head.output.save()
        >>> image.shape, logits.shape
        (torch.Size([1, 4, 32]), torch.Size([1, 6, 100]))

    With a processor, `model.trace("<image>What is this?", images=[image])`, and in a batch:

        with model.trace() as tracer:
            with tracer.invoke("<image>What is this?", images=[image]):
                first = model.lm_head.output[:, -1].save()
            with tracer.invoke("<image><image>Which is larger?", images=[left, right]):
                second = model.lm_head.output[:, -1].save()

    Args:
        model: A name on the hub, a local folder, or a module of your own, which is used as it stands.
        processor: A processor of your own; by default the model's.
        dispatch: Load the weights now.
        rename: Other names for modules, as for `NNsight`.
        envoys: Classes of your own to stand for modules, as for `NNsight`.
        auto_class: The class of transformers to load it with.
        **options: Passed to `from_pretrained`: `device_map`, `dtype`, `attn_implementation`, `revision`, …; `peft`, an
            adapter's folder or name on the hub, gives the model its layers.

    Raises:
        LoadError: The model cannot be found or loaded.
    """

    def __init__(
        self,
        model: str | Module,
        *,
        processor: Any = None,
        dispatch: bool = False,
        rename: Mapping[str, str] | None = None,
        envoys: Mapping[type[Module] | str, type[Envoy]] | None = None,
        auto_class: str = "AutoModelForImageTextToText",
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            auto_class=auto_class,
            processor=processor,
            dispatch=dispatch,
            rename=rename,
            envoys=envoys,
            **options,
        )
