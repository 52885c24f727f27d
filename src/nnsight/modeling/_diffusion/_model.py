"""DiffusionModel: a pipeline of diffusers, traced at every denoising step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from ..._core import RESULT, Call, Probe
from ...envoy import Envoy
from ...errors import InputError, NoInputError
from ...trace import Given, Prepared, Tracer
from .._base import NO_INPUT, NNsight, check_block
from .._present import Presenter, accept, stand_in
from ._inputs import Inputs, first_argument, read
from ._pipeline import Pipeline, PipelineSource, tree_of
from ._steps import STEP_BEGINS, Denoising


class DiffusionModel(NNsight):
    """A pipeline of diffusers (Stable Diffusion and its like, diffusion transformers), with all its modules.

    `model.unet` (or `model.transformer`), `model.vae`, `model.text_encoder` are the pipeline's own; `tracer.iter` goes
    through its denoising steps, and `tracer.result` is what the pipeline returns.  Under classifier-free guidance the denoiser
    runs on `[uncond; cond]`: a batch twice as long, in which an invoke sees its own rows of both halves, as if it was alone.

    Nothing is loaded but the configs until the first trace, or `dispatch=True`.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, AutoencoderKL
        >>> from nnsight import DiffusionModel
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
        >>> transformer = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, norm_num_groups=2)
        >>> vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, sample_size=8)
        >>> pipeline = DiTPipeline(transformer, vae, DDIMScheduler())
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> model = DiffusionModel(pipeline)
        >>> hidden = []
        >>> with model.generate(class_labels=[3], num_inference_steps=2, seed=0, output_type="pt") as tracer:
        ...     for step in tracer.iter[:]:
        ...         hidden.append(model.transformer.transformer_blocks[0].output)
        ...     image = tracer.result.images.save()
        >>> len(hidden), image.shape
        (2, torch.Size([1, 3, 8, 8]))

    Args:
        model: A name on the hub, a local folder, or a pipeline of your own, which is used as it stands.
        dispatch: Load the weights now.
        rename: Other names for modules, as for `NNsight`.
        envoys: Classes of your own to stand for modules, as for `NNsight`.
        **options: Passed to `DiffusionPipeline.from_pretrained`: `torch_dtype`, `variant`, `revision`, `device_map`, ….

    Raises:
        LoadError: The pipeline cannot be found or loaded.
    """

    def __init__(
        self,
        model: Any,
        *,
        dispatch: bool = False,
        rename: Mapping[str, str] | None = None,
        envoys: Mapping[type[Module] | str, type[Envoy]] | None = None,
        **options: Any,
    ) -> None:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        self._source: PipelineSource | None = None
        if isinstance(model, DiffusionPipeline):
            root = tree_of(model)
        elif isinstance(model, Module):
            raise InputError("DiffusionModel takes a pipeline of diffusers, or its name; NNsight takes any module.")
        else:
            self._source = PipelineSource(str(model), options)
            root = self._source.build_empty()
        super().__init__(root, rename=rename, envoys=envoys)
        self._tree.plain_tensors = False
        self._tree.accept, self._tree.stand_in = accept, stand_in
        self._tree.present = Presenter(root)
        self._tree.stepper = STEP_BEGINS
        self.dispatched = self._source is None
        if dispatch:
            self.dispatch()

    @property
    def pipeline(self) -> Any:
        """The pipeline itself, loaded.

        Example:
            >>> from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
            >>> from nnsight import DiffusionModel
            >>> kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
            >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=2, **kinds)
            >>> model = DiffusionModel(DDPMPipeline(unet, DDIMScheduler()))
            >>> type(model.pipeline).__name__
            'DDPMPipeline'
        """
        return self.dispatch()._module.__dict__["_pipeline"]

    def dispatch(self) -> DiffusionModel:
        """Load the weights, if they are not there yet; envoys taken before stay valid.

        Example:
            >>> from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
            >>> from nnsight import DiffusionModel
            >>> kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
            >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=2, **kinds)
            >>> model = DiffusionModel(DDPMPipeline(unet, DDIMScheduler()))
            >>> model.dispatched, model.dispatch() is model  # a pipeline of one's own has its weights
            (True, True)
        """
        if not self.dispatched:
            assert self._source is not None
            self._take(tree_of(self._source.load()))
            self._tree.present = Presenter(self._module)
        return self

    def generate(
        self,
        *inputs: Any,
        trace: bool = True,
        strict_order: bool = False,
        stop_after_last: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate images, with a block that reads and changes what happens at each denoising step.

        What the block asks for is of the first step, unless it iterates (`tracer.iter`, `tracer.all()`,
        `tracer.next()`).  What runs before the first step (text encoders) and after the last one (the decoder) belongs to them.

        Example:
            >>> from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
            >>> from nnsight import DiffusionModel
            >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
            >>> transformer = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, norm_num_groups=2)
            >>> vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, sample_size=8)
            >>> model = DiffusionModel(DiTPipeline(transformer, vae, DDIMScheduler()))
            >>> model.pipeline.set_progress_bar_config(disable=True)
            >>> with model.generate(num_inference_steps=2, output_type="pt") as tracer:
            ...     with tracer.invoke(class_labels=[1], seed=0):
            ...         model.transformer.output[0][:] *= 0.5
            ...         first = tracer.result.images.save()
            ...     with tracer.invoke(class_labels=[2], seed=1):
            ...         second = tracer.result.images.save()
            >>> first.shape, second.shape
            (torch.Size([1, 3, 8, 8]), torch.Size([1, 3, 8, 8]))

        Args:
            *inputs: A prompt, or several; what the pipeline takes first. Anything else by name.
            trace: False generates plainly and returns what the pipeline returns.
            strict_order: As for `trace`.
            stop_after_last: End the generation once the block's last request was served, in the middle of a step if need be; a
                request for `tracer.result`, or any `tracer.cache()`, is one for all of it.
            **kwargs: Arguments of the pipeline: `num_inference_steps`, `guidance_scale`, `height`, `output_type`, …; and
                `seed`: the noise of an input comes from a generator with this seed, on the CPU, as with
                `pipeline(..., generator=torch.Generator().manual_seed(seed))`. Several images of one input draw from it in
                turn (`generator=[generator] * n`).

        Returns:
            A `Tracer`, or with `trace=False` what the pipeline returns.
        """
        self.dispatch()
        given = self._take_given(inputs, kwargs)
        if not trace:
            check_block(stop_after_last)
            return self._prepare([given] if given else [], kwargs).call()
        return Tracer(
            self._tree,
            lambda givens: self._prepare(givens, kwargs),
            given,
            edits=self._edits,
            strict_order=strict_order,
            stop_after_last=stop_after_last,
        )

    def trace(
        self,
        *inputs: Any,
        trace: bool = True,
        strict_order: bool = False,
        stop_after_last: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`generate` with a single denoising step, unless `num_inference_steps` says otherwise.

        Example:
            >>> from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
            >>> from nnsight import DiffusionModel
            >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
            >>> transformer = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, norm_num_groups=2)
            >>> vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, sample_size=8)
            >>> model = DiffusionModel(DiTPipeline(transformer, vae, DDIMScheduler()))
            >>> model.pipeline.set_progress_bar_config(disable=True)
            >>> with model.trace(class_labels=[3], seed=0):
            ...     noise = model.transformer.output[0].save()
            >>> noise.shape  # [uncond; cond], and the variance beside the noise
            torch.Size([2, 8, 8, 8])

        Args:
            *inputs: As for `generate`.
            trace: As for `generate`.
            strict_order: Make reading a place that has passed an error; it is one anyway, as a generation is not repeated.
            stop_after_last: As for `generate`.
            **kwargs: As for `generate`.

        Returns:
            As for `generate`.
        """
        options = {"strict_order": strict_order, "stop_after_last": stop_after_last, "num_inference_steps": 1, **kwargs}
        return self.generate(*inputs, trace=trace, **options)

    def scan(self, *inputs: Any, strict_order: bool = False, stop_after_last: bool = False, **kwargs: Any) -> Any:
        """As for `NNsight`, of a single denoising step; the weights are loaded, and the result is left as latents.

        Example:
            >>> from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
            >>> from nnsight import DiffusionModel
            >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
            >>> transformer = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, norm_num_groups=2)
            >>> vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, sample_size=8)
            >>> model = DiffusionModel(DiTPipeline(transformer, vae, DDIMScheduler()))
            >>> model.pipeline.set_progress_bar_config(disable=True)
            >>> with model.scan(class_labels=[3]) as tracer:
            ...     shape = model.transformer.transformer_blocks[0].output.shape
            ...     tracer.stop()  # this pipeline makes a picture of numpy's next, and a scan has no numbers
            >>> shape
            torch.Size([2, 16, 16])
        """
        self.dispatch()
        options = {"num_inference_steps": 1, "output_type": "latent", **kwargs}
        return super().scan(*inputs, strict_order=strict_order, stop_after_last=stop_after_last, **options)

    def _take_given(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
        names = {"prompt", "prompt_embeds", "class_labels", "batch_size", first_argument(self.pipeline)}
        named = {name: kwargs.pop(name) for name in [*kwargs] if name in names}
        return Given(inputs, named) if inputs or named else None

    def _prepare(self, givens: list[Given], kwargs: dict[str, Any]) -> Prepared:
        root = self._module
        assert isinstance(root, Pipeline)
        first = first_argument(self.pipeline)
        if not givens and first != "batch_size":
            raise NoInputError(NO_INPUT)
        inputs = Inputs([read(given, first) for given in givens] or [{}], kwargs)
        run = Denoising(root, inputs.rows * inputs.each)
        probe = _probe(root, inputs) if len(inputs.sizes) > 1 else None
        call = Call(run, (), inputs.for_pipeline(), repeatable=False, probe=probe, batch_first=(RESULT, root))
        return Prepared(call, inputs.sizes)


def _probe(root: Pipeline, inputs: Inputs) -> Probe:
    """Trials on a twin of the pipeline, which shares its modules and nothing that a run changes."""
    latest: list[Denoising] = []

    def make(rows: list[int]) -> Call:
        pipeline = root.__dict__["_pipeline"]
        twin = copy.copy(pipeline)
        twin.__dict__["scheduler"] = copy.deepcopy(pipeline.scheduler)
        twin.__dict__["_progress_bar_config"] = {"disable": True}
        latest[:] = [Denoising(root, len(rows) * inputs.each, twin)]
        return Call(latest[0], (), inputs.sample(rows), repeatable=False)

    return Probe(make, groups=lambda: latest[0].groups)
