"""Tensor parallel engines: two workers, each with a part of every projection, and values that are whole all the same."""

import os

import pytest
import torch

from nnsight.errors import EngineError

from .generations import close

PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def two(engines):
    """Llama in two workers, each on a core of its own."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two cores")
    cores = sorted(os.sched_getaffinity(0))
    before = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}|{cores[1]}"
    yield engines("llama", tensor_parallel_size=2)
    os.environ.pop("VLLM_CPU_OMP_THREADS_BIND")
    if before is not None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = before


def test_values_are_whole(two):
    engine, plain = two.engine, two.plain
    with engine.trace(PROMPT, max_tokens=1):
        layer = engine.layers[1]
        found = [
            engine.resid_pre[1].save(),
            layer.self_attn.qkv_proj.output.save(),
            layer.self_attn.o_proj.input.save(),
            engine.attn_out[1].save(),
            layer.mlp.gate_up_proj.output.save(),
            layer.mlp.down_proj.input.save(),
            engine.mlp_out[1].save(),
            engine.logits.save(),
        ]
    with plain.trace(PROMPT):
        layer = plain.model.layers[1]
        stream = plain.resid_pre[1].save()
        attention = torch.cat([getattr(layer.self_attn, f"{name}_proj").output for name in "qkv"], -1).save()
        mixed = layer.self_attn.o_proj.input.save()
        attended = plain.attn_out[1].save()
        gate, up = layer.mlp.gate_proj.output.save(), layer.mlp.up_proj.output.save()
        inner = layer.mlp.down_proj.input.save()
        expected = [stream, attention, mixed, attended, torch.cat([gate, up], -1), inner]
        expected += [plain.mlp_out[1].save(), plain.logits.save()]
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_edits_reach_every_part(two):
    engine, plain = two.engine, two.plain

    def edit(model, layer):
        model.resid_pre[0][:, 2] *= 1.5
        layer.self_attn.o_proj.input[..., 20:90] *= 0.5
        model.attn_out[1][:] += 0.1
        layer.mlp.down_proj.input = layer.mlp.down_proj.input * torch.linspace(0, 2, 64)
        model.resid_post[2][:, -1] -= 0.5

    with engine.trace(PROMPT, max_tokens=1):
        edit(engine, engine.layers[1])
        found = engine.logits.save()
    with plain.trace(PROMPT):
        edit(plain, plain.model.layers[1])
        expected = plain.logits.save()
    close(found, expected)


def test_projections_that_hold_several(two):
    engine, plain = two.engine, two.plain
    with engine.trace(PROMPT, max_tokens=1):
        engine.layers[1].self_attn.qkv_proj.output[..., 150:200] = 0  # of 128 queries, 64 keys and 64 values
        engine.layers[1].mlp.gate_up_proj.output[..., 40:80] *= 2
        found = engine.logits.save()
    with plain.trace(PROMPT):
        layer = plain.model.layers[1]
        layer.self_attn.k_proj.output[..., 22:64] = 0
        layer.self_attn.v_proj.output[..., :8] = 0
        layer.mlp.gate_proj.output[..., 40:] *= 2
        layer.mlp.up_proj.output[..., :16] *= 2
        expected = plain.logits.save()
    close(found, expected)


def test_steps_requests_and_chance(two):
    engine, plain = two.engine, two.plain
    with engine.trace(max_tokens=3, ignore_eos=True) as tracer:
        with tracer.invoke(PROMPT):
            streams = [].save()
            for _ in tracer.iter[:]:
                noise = torch.rand(engine.resid_post[0].shape)
                engine.resid_post[0][:] += noise
                streams.append(noise)
            tokens = tracer.result.save()
        with tracer.invoke("The capital of France is"):
            other = engine.logits.save()
    assert len(streams) == 3
    with plain.generate(PROMPT, max_new_tokens=3, do_sample=False) as tracer:
        for step in tracer.iter[:]:
            plain.resid_post[0][:] += streams[step]
        expected = tracer.result.save()
    assert tokens[0].tolist() == expected[0].tolist()
    with plain.trace("The capital of France is"):
        alone = plain.logits.save()
    close(other, alone)


def test_what_is_in_parts_that_nobody_knows_is_refused(two):
    engine = two.engine
    with (
        pytest.raises(EngineError, match=r"act_fn.*is in parts here, one in each of 2 workers"),
        engine.trace(PROMPT, max_tokens=1),
    ):
        engine.layers[1].mlp.act_fn.output.save()
    with engine.trace(PROMPT, max_tokens=1):
        found = engine.logits.save()
    assert found.isfinite().all()
