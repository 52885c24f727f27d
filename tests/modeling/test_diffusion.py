"""DiffusionModel: a small Stable Diffusion and a small diffusion transformer, against the plain pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers as tf

from nnsight import DiffusionModel
from nnsight.errors import InputError, LoadError, NoInputError, OutOfOrderError

from . import small

STEPS = 3


def vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )


def stable_diffusion(scheduler: Any = None) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    tokenizer = small.tokenizer()
    tokenizer.model_max_length = 16
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=tf.CLIPTextModel(tf.CLIPTextConfig(**small.TEXT, max_position_embeddings=16)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler or diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def dit() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        norm_num_groups=2,
        num_embeds_ada_norm=1000,
    )
    pipeline = diffusers.DiTPipeline(transformer.eval(), vae().eval(), diffusers.DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return DiffusionModel(stable_diffusion())


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def plain(model: DiffusionModel, prompt: Any, seed: int, **options: Any) -> torch.Tensor:
    options = {"num_inference_steps": STEPS, "output_type": "pt", **options}
    return model.pipeline(prompt, generator=torch.Generator().manual_seed(seed), **options).images


class TestOnePrompt:
    @pytest.mark.parametrize(
        "scheduler",
        [
            None,
            diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
            diffusers.DPMSolverMultistepScheduler(steps_offset=1),
        ],
        ids=["ddim", "pndm", "dpm"],
    )
    def test_a_seed_gives_the_plain_pipelines_image(self, scheduler: Any) -> None:
        model = DiffusionModel(stable_diffusion(scheduler))
        with model.generate("a red cat", num_inference_steps=STEPS, seed=5, output_type="pt") as tracer:
            steps = [(step, model.unet.output[0]) for step in tracer.iter[:]]
            decoded = model.vae.decoder.output.save()
            result = tracer.result.save()
        assert torch.equal(result.images, plain(model, "a red cat", 5))
        assert [step for step, _ in steps] == list(range(len(model.pipeline.scheduler.timesteps)))
        assert close(((decoded / 2) + 0.5).clamp(0, 1), result.images)
        again = model.generate("a red cat", num_inference_steps=STEPS, seed=5, output_type="pt", trace=False)
        assert torch.equal(again.images, result.images)
        assert not torch.equal(result.images, plain(model, "a red cat", 6))

    def test_each_step_is_what_hooks_see(self, model: DiffusionModel) -> None:
        seen: list[torch.Tensor] = []
        handle = model.unet.mid_block._module.register_forward_hook(lambda _m, _a, output: seen.append(output))
        plain(model, "a red cat", 5)
        handle.remove()
        with model.generate("a red cat", num_inference_steps=STEPS, seed=5) as tracer:
            found = [model.unet.mid_block.output for _ in tracer.iter[:]]
            text = model.text_encoder
        assert len(seen) == len(found) == STEPS
        assert all(torch.equal(one, other) for one, other in zip(seen, found, strict=True))

    def test_edits_of_unet_text_encoder_and_decoder(self, model: DiffusionModel) -> None:
        def edit_unet(step: int) -> Any:
            count = iter(range(STEPS))
            return lambda _m, _a, output: output * 0.5 if next(count) == step else output

        handle = model.unet.mid_block._module.register_forward_hook(edit_unet(1))
        expected = plain(model, "a red cat", 5)
        handle.remove()
        with model.generate("a red cat", num_inference_steps=STEPS, seed=5, output_type="pt") as tracer:
            for _ in tracer.iter[1]:
                model.unet.mid_block.output = model.unet.mid_block.output * 0.5
            found = tracer.result.images.save()
        assert torch.equal(found, expected)
        assert not torch.equal(found, plain(model, "a red cat", 5))

        block = model.text_encoder.encoder.layers[0]
        handle = block._module.register_forward_hook(lambda _m, _a, output: output * 0)
        expected = plain(model, "a red cat", 5, guidance_scale=1)
        handle.remove()
        options = {"num_inference_steps": STEPS, "guidance_scale": 1, "output_type": "pt"}
        with model.generate("a red cat", seed=5, **options) as tracer:
            block.output[0][:] = 0
            found = tracer.result.images.save()
        assert torch.equal(found, expected)

        with model.generate("a red cat", num_inference_steps=STEPS, seed=5, output_type="pt") as tracer:
            model.vae.decoder.output[:] = 1
            found = tracer.result.images.save()
        assert bool((found == 1).all())

    def test_a_lasting_edit_runs_at_every_step(self, model: DiffusionModel) -> None:
        handle = model.unet.mid_block._module.register_forward_hook(lambda _m, _a, output: output * 0.5)
        expected = plain(model, "a red cat", 5)
        handle.remove()
        with model.edit() as edited:
            model.unet.mid_block.output[:] *= 0.5
        found = edited.generate("a red cat", num_inference_steps=STEPS, seed=5, output_type="pt")
        with found as tracer:
            images = tracer.result.images.save()
        assert torch.equal(images, expected)

    def test_trace_is_one_step(self, model: DiffusionModel) -> None:
        with model.trace("a red cat", seed=5, output_type="latent") as tracer:
            noise = model.unet.output[0].save()
            latents = tracer.result.images.save()
        assert noise.shape == (2, 4, 8, 8)
        assert torch.equal(latents, plain(model, "a red cat", 5, num_inference_steps=1, output_type="latent"))

    def test_the_generation_ends_after_the_last_request(self, model: DiffusionModel) -> None:
        calls: list[int] = []
        handle = model.unet._module.register_forward_hook(lambda *_: calls.append(1))
        options = {"num_inference_steps": STEPS, "seed": 5, "output_type": "pt"}
        with model.generate("a red cat", **options) as tracer:
            expected = [model.unet.mid_block.output.clone() for _ in tracer.iter[:2]]
        assert len(calls) == STEPS
        calls.clear()
        with model.generate("a red cat", stop_after_last=True, **options) as tracer:
            found = [model.unet.mid_block.output.clone() for _ in tracer.iter[:2]]
        assert len(calls) == 1  # the second was left in its middle
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        with model.generate("a red cat", stop_after_last=True, **options) as tracer:
            images = tracer.result.images.save()
        handle.remove()
        assert torch.equal(images, plain(model, "a red cat", 5))
        with model.trace("a red cat", seed=5, stop_after_last=True):
            assert model.text_encoder.output[0].shape[0] >= 1

    def test_stopping_and_errors_leave_nothing_behind(self, model: DiffusionModel) -> None:
        hooks = model.unet._module._forward_pre_hooks
        with model.generate("a red cat", num_inference_steps=STEPS, seed=5) as tracer:
            noise = model.unet.output[0].save()
            tracer.stop()
        assert not hooks
        with pytest.raises(ZeroDivisionError):
            with model.generate("a red cat", num_inference_steps=STEPS, seed=5):
                model.unet.output[0]
                1 / 0
        assert not hooks
        assert torch.equal(plain(model, "a red cat", 5), plain(model, "a red cat", 5))
        with pytest.raises(OutOfOrderError):
            with model.generate("a red cat", num_inference_steps=STEPS, seed=5):
                model.vae.decoder.output.save()
                model.unet.output.save()

    def test_a_callback_of_the_users_own(self, model: DiffusionModel) -> None:
        def end(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            steps.append(step)
            return {"latents": tensors["latents"] * 0.5}

        steps: list[int] = []
        expected = plain(model, "a red cat", 5, callback_on_step_end=end)
        with model.generate(
            "a red cat", num_inference_steps=STEPS, seed=5, output_type="pt", callback_on_step_end=end
        ) as tracer:
            count = len([model.unet.output for _ in tracer.iter[:]])
            found = tracer.result.images.save()
        assert torch.equal(found, expected)
        assert (count, steps) == (STEPS, [*range(STEPS), *range(STEPS)])

    def test_refusals(self, model: DiffusionModel) -> None:
        with pytest.raises(NoInputError):
            model.generate(num_inference_steps=1, trace=False)
        with pytest.raises(InputError, match="not both"):
            model.generate("a", seed=1, generator=torch.Generator(), trace=False)
        with pytest.raises(InputError, match="NNsight takes any module"):
            DiffusionModel(torch.nn.Linear(1, 1))


def values(model: DiffusionModel) -> tuple[torch.Tensor, ...]:
    """Of one step, in the order the model runs: on a timestep, on tokens of the image, and on channels."""
    time = model.unet.time_embedding.output
    query = model.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_q.output
    return time, query, model.unet.mid_block.output, model.unet.output[0]


class TestPromptsAsInvokes:
    PROMPTS = (("a red cat", 5), ("the dog is in the tower", 7), (["green", "blue cat"], 9))

    @pytest.mark.parametrize("options", [{}, {"guidance_scale": 1}, {"num_images_per_prompt": 2}], ids=str)
    def test_rows_are_those_of_single_runs(self, model: DiffusionModel, options: dict[str, Any]) -> None:
        options = {"num_inference_steps": STEPS, "output_type": "pt", **options}
        found = []
        with model.generate(**options) as tracer:
            for prompt, seed in self.PROMPTS:
                with tracer.invoke(prompt, seed=seed):
                    text = model.text_encoder.output.last_hidden_state
                    steps = []
                    with tracer.iter[:]:
                        steps.append(values(model))
                    decoded = model.vae.decoder.output
                    found.append((text, steps, decoded, tracer.result.images))
        for (prompt, seed), (text, steps, decoded, images) in zip(self.PROMPTS, found, strict=True):
            with model.generate(prompt, seed=seed, **options) as tracer:
                expected_text = model.text_encoder.output.last_hidden_state.save()
                expected_steps = [values(model) for _ in tracer.iter[:]]
                expected_decoded = model.vae.decoder.output.save()
                expected_images = tracer.result.images.save()
            assert close(text, expected_text)
            assert len(steps) == len(expected_steps) == STEPS
            for one, other in zip(steps, expected_steps, strict=True):
                assert all(close(a, b) for a, b in zip(one, other, strict=True))
            assert close(decoded, expected_decoded)
            assert close(images, expected_images)

    def test_edits_reach_both_halves_of_their_rows_alone(self, model: DiffusionModel) -> None:
        options = {"num_inference_steps": STEPS, "output_type": "pt"}

        def edit(number: int) -> None:
            hidden = model.unet.mid_block.output
            if number == 0:
                hidden[:] *= 0.5
            elif number == 1:
                model.unet.mid_block.output = hidden * 2
            else:
                hidden[1] = 0  # the second prompt's unconditional half: a copy, which is written back
                hidden[2:] += 1

        found = []
        with model.generate(**options) as tracer:
            for i, (prompt, seed) in enumerate(self.PROMPTS):
                with tracer.invoke(prompt, seed=seed):
                    with tracer.iter[:2]:
                        edit(i)
                    found.append(tracer.result.images)
        for i, (prompt, seed) in enumerate(self.PROMPTS):
            with model.generate(prompt, seed=seed, **options) as tracer:
                for _ in tracer.iter[:2]:
                    edit(i)
                expected = tracer.result.images.save()
            assert close(found[i], expected)

    def test_a_copy_cannot_be_changed_afterwards(self, model: DiffusionModel) -> None:
        with pytest.raises(OutOfOrderError, match="do not lie together"):
            with model.generate(num_inference_steps=STEPS) as tracer:
                with tracer.invoke("a red cat", seed=1):
                    model.unet.output.save()
                with tracer.invoke(["a", "b"], seed=1):
                    hidden = model.unet.mid_block.output
                    model.unet.output.save()
                    hidden[:] = 0

    def test_a_block_of_the_whole_batch_sees_uncond_before_cond(self, model: DiffusionModel) -> None:
        with model.generate(num_inference_steps=1) as tracer:
            with tracer.invoke("a red cat", seed=1):
                first = model.unet.mid_block.output.clone()
            with tracer.invoke("a dog", seed=2):
                second = model.unet.mid_block.output.clone()
            with tracer.invoke():
                whole = model.unet.mid_block.output.clone()
        assert torch.equal(whole, torch.stack([first, second], 1).flatten(0, 1))

    @pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
    def test_an_invoke_gets_its_own_images(self, model: DiffusionModel, kind: str) -> None:
        with model.generate(num_inference_steps=1, output_type=kind) as tracer:
            with tracer.invoke("a red cat", seed=1):
                first = tracer.result.images
            with tracer.invoke(["a", "dog"], seed=2):
                second = model.output.images
        for images, prompt, seed in ((first, "a red cat", 1), (second, ["a", "dog"], 2)):
            expected = model.generate(prompt, num_inference_steps=1, output_type=kind, seed=seed, trace=False).images
            assert len(images) == len(expected) == (1 if seed == 1 else 2)
            pairs = zip(images, expected, strict=True)
            assert all(
                np.abs(np.asarray(a, float) - np.asarray(b, float)).max() < 1.01e-4 + (kind == "pil") for a, b in pairs
            )

    def test_negative_prompts_and_what_must_be_shared(self, model: DiffusionModel) -> None:
        options = {"num_inference_steps": STEPS, "output_type": "pt"}
        with model.generate(**options) as tracer:
            with tracer.invoke("a red cat", negative_prompt="blue dog", seed=1):
                first = tracer.result.images
            with tracer.invoke("a dog", seed=2):
                second = tracer.result.images
        assert close(first, plain(model, "a red cat", 1, negative_prompt="blue dog"))
        assert close(second, plain(model, "a dog", 2))
        with model.generate(negative_prompt="blue dog", **options) as tracer:
            with tracer.invoke("a red cat", seed=1):
                first = tracer.result.images
            with tracer.invoke("a dog", seed=2):
                second = tracer.result.images
        assert close(second, plain(model, "a dog", 2, negative_prompt="blue dog"))
        with pytest.raises(InputError, match="guidance_scale cannot differ"):
            with model.generate(**options) as tracer:
                with tracer.invoke("a red cat", guidance_scale=2):
                    tracer.result.save()
                with tracer.invoke("a dog"):
                    tracer.result.save()


class TestTransformer:
    def test_one_input(self) -> None:
        model = DiffusionModel(dit())
        options = {"num_inference_steps": STEPS, "output_type": "pt"}
        expected = model.pipeline(class_labels=[4], generator=torch.Generator().manual_seed(3), **options).images
        with model.generate(class_labels=[4], seed=3, **options) as tracer:
            blocks = [model.transformer.transformer_blocks[1].output for _ in tracer.iter[:]]
            decoded = model.vae.decoder.output.save()
            images = tracer.result.images.save()
        assert torch.equal(images, expected)
        assert len(blocks) == STEPS
        assert blocks[0].shape[0] == 2

    def test_invokes(self) -> None:
        model = DiffusionModel(dit())
        options = {"num_inference_steps": STEPS, "output_type": "pt"}
        found = []
        with model.generate(**options) as tracer:
            for label in (4, 7):
                with tracer.invoke([label], seed=label):
                    with tracer.iter[:2]:
                        model.transformer.transformer_blocks[0].output[:] *= label / 8
                    found.append(tracer.result.images)
        for label, images in zip((4, 7), found, strict=True):
            with model.generate([label], seed=label, **options) as tracer:
                for _ in tracer.iter[:2]:
                    model.transformer.transformer_blocks[0].output[:] *= label / 8
                expected = tracer.result.images.save()
            assert close(images, expected)


class TestLoading:
    def test_a_local_folder_is_loaded_when_it_is_needed(self, tmp_path: Path) -> None:
        pipeline = stable_diffusion()
        pipeline.save_pretrained(tmp_path)
        model = DiffusionModel(str(tmp_path))
        assert not model.dispatched
        middle = model.unet.mid_block
        assert model.unet.conv_in.weight.is_meta
        assert {name for name, _ in model._module.named_children()} == {"vae", "text_encoder", "unet"}
        model.pipeline.set_progress_bar_config(disable=True)
        with model.generate("a red cat", num_inference_steps=1, seed=5, output_type="pt") as tracer:
            hidden = middle.output.save()
            images = tracer.result.images.save()
        assert model.dispatched
        assert not model.unet.conv_in.weight.is_meta
        generator = torch.Generator().manual_seed(5)
        expected = pipeline("a red cat", num_inference_steps=1, generator=generator, output_type="pt").images
        assert torch.equal(images, expected)
        assert isinstance(model.scheduler, diffusers.DDIMScheduler)

    @pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")  # diffusers passes it
    def test_a_name_that_cannot_be_found(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="local folder"):
            DiffusionModel("nobody/has-this")
        with pytest.raises(LoadError, match="no such folder"):
            DiffusionModel(str(tmp_path / "nothing"))
