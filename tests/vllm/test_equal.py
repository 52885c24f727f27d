"""The same block on an engine and on `LanguageModel`: the same values, edits and tokens."""

import pytest
import torch

PROMPTS = ("The Eiffel Tower is in the city of", "The capital of France is", "The Colosseum")


def close(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.detach().float(), expected.detach().float(), atol=1e-4, rtol=1e-4)


def both(pair, block, *args):
    for found, expected in zip(block(pair.engine, *args), block(pair.plain, *args), strict=True):
        close(found, expected)


def steps(model, prompt, count):
    """A generation of `count` tokens: the engine and transformers name that differently."""
    from nnsight.modeling.vllm import VLLM

    options = {"max_tokens": count} if isinstance(model, VLLM) else {"max_new_tokens": count, "do_sample": False}
    return model.generate(prompt, **options)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_reads(pair, prompt):
    def block(model):
        with model.trace(prompt):
            found = [
                model.embed.output.save(),
                model.resid_pre[1].save(),
                model.attn_out[1].save(),
                model.resid_mid[1].save(),
                model.mlp_out[1].save(),
                model.resid_post[1].save(),
                model.layers[2].output[0].save(),
                model.final_norm.input.save(),
                model.final_norm.output.save(),
                model.lm_head.input.save(),
                model.logits.save(),
                model.output.logits.save(),
            ]
        return found

    both(pair, block)


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_edits(pair, prompt):
    def block(model):
        with model.trace(prompt):
            model.resid_pre[1][:, 0] = 0
            model.attn_out[1] = model.attn_out[1] * 0.5
            model.mlp_out[1][:, -1] += 1
            model.resid_post[1][:] *= 1.5
            model.final_norm.output[:, -1] -= 0.5
            logits = model.logits.save()
        return [logits]

    both(pair, block)


def test_edits_of_inputs(pair):
    def block(model, name):
        with model.trace(PROMPTS[0]):
            model.layers[1].input[:, 2] *= 0.5
            part = getattr(model.layers[1], name)
            part.input = part.input * 1.5
            model.final_norm.input[:, -1] += 0.3
            model.lm_head.input[:, -1] *= 0.9
            logits = model.logits.save()
        return logits

    name = "block_sparse_moe" if pair.name == "mixtral" else "mlp"  # vLLM's; transformers calls it mlp everywhere
    close(block(pair.engine, name), block(pair.plain, "mlp"))


def test_skip(pair):
    def block(model):
        with model.trace(PROMPTS[0]):
            model.layers[1].skip(model.layers[0].output)
            logits = model.logits.save()
        return [logits]

    both(pair, block)


def test_each_step(pair):
    def block(model):
        with steps(model, PROMPTS[0], 5) as tracer:
            streams = [].save()
            for _ in tracer.iter[:]:
                model.resid_post[0][:, -1] *= 1.5
                streams.append(model.resid_post[2])
            tokens = tracer.result.save()
        return [*streams, tokens]

    both(pair, block)


def test_some_steps(pair):
    def block(model):
        with steps(model, PROMPTS[1], 4) as tracer:
            with tracer.iter[1:3] as step:
                model.resid_post[1][:] += 0.3 * step
            tokens = tracer.result.save()
        return [tokens]

    both(pair, block)


def test_several_prompts(pair):
    def alone(model, prompt, factor):
        with model.trace(prompt):
            model.resid_post[0][:] *= factor
            found = [model.resid_post[1].save(), model.logits.save()]
        return found

    model = pair.engine
    with model.trace() as tracer:
        found = [].save()
        with tracer.invoke(PROMPTS[0]):
            model.resid_post[0][:] *= 1.0
            found += [model.resid_post[1], model.logits]
        with tracer.invoke(PROMPTS[1]):
            model.resid_post[0][:] *= 0.5
            found += [model.resid_post[1], model.logits]
        with tracer.invoke(PROMPTS[2]):
            model.resid_post[0][:] *= 2.0
            found += [model.resid_post[1], model.logits]
    expected = [v for p, f in zip(PROMPTS, (1.0, 0.5, 2.0), strict=True) for v in alone(pair.plain, p, f)]
    # requests of one wave may reach the worker in any order
    assert len(found) == len(expected)
    for value in expected:
        assert any(f.shape == value.shape and torch.allclose(f, value, atol=1e-4, rtol=1e-4) for f in found)


def test_values_of_one_prompt_in_another(pair):
    def block(model):
        with model.trace() as tracer:
            with tracer.invoke(PROMPTS[0]):
                source = model.resid_post[1][:, -1]
            with tracer.invoke(PROMPTS[1]):
                model.resid_post[1][:, -1] = source
                last = model.logits[0, -1].save()
        return [last]

    both(pair, block)


def test_stored_edits(pair):
    def block(model):
        with model.edit() as edited:
            model.mlp_out[1][:] = 0
        with edited.trace(PROMPTS[0]):
            logits = edited.logits.save()
        with model.trace(PROMPTS[0]):
            plain = model.logits.save()
        return [logits, plain]

    both(pair, block)


def test_logits_decide_what_is_sampled(pair):
    model = pair.engine
    with model.trace(PROMPTS[0], max_tokens=3, ignore_eos=True) as tracer:
        samples = [].save()
        for step in tracer.iter[:]:
            model.logits[0, -1, 40 + step] = 1e4
            samples.append(model.samples)
        tokens = tracer.result.save()
    assert [s.tolist() for s in samples] == [[40], [41], [42]]
    assert tokens[0, -3:].tolist() == [40, 41, 42]


def test_samples_can_be_exchanged(pair):
    model = pair.engine
    with model.trace(PROMPTS[0], max_tokens=2, ignore_eos=True) as tracer:
        for step in tracer.iter[:]:
            model.samples = torch.tensor([50 + step])
        tokens = tracer.result.save()
    assert tokens[0, -2:].tolist() == [50, 51]


def test_nothing_asked_for_is_the_plain_engine(pair):
    model = pair.engine
    with model.trace(PROMPTS[0], max_tokens=4) as tracer:
        tokens = tracer.result.save()
    plain = model.trace(PROMPTS[0], trace=False, max_tokens=4)[0]
    assert tokens[0].tolist() == [*plain.prompt_token_ids, *plain.outputs[0].token_ids]


def test_interventions_as_data(pair):
    from nnsight.experiments import Intervention, InterventionSpec

    vectors = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)) * 2
    specs = [
        InterventionSpec(Intervention("resid_post[1]", "add", value=vectors[0])),
        InterventionSpec(Intervention("resid_pre[1]", "scale", factor=-0.5), Intervention("mlp_out[1]", "zero")),
        InterventionSpec(Intervention("resid_post[0]", "project_out", value=vectors[1:])),
        InterventionSpec(
            Intervention("resid_post[1]", "set", value=vectors[1], positions=[-2]),
            Intervention("resid_post[1]", "project_out", value=vectors[2], positions="last"),
            Intervention("attn_out[2]", "add", value=vectors[3], factor=3.0),
        ),
        InterventionSpec(
            Intervention("embed", "add", value=vectors[0] / 8), Intervention("final_norm", "add", value=vectors[1])
        ),
    ]
    for spec in specs:
        with pair.engine.apply(spec), pair.engine.trace(max_tokens=5, min_tokens=5) as tracer:
            tokens = [].save()
            for prompt in PROMPTS:
                with tracer.invoke(prompt):
                    tokens.append(tracer.result)
        for prompt in PROMPTS:
            options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
            with pair.plain.apply(spec), pair.plain.generate(prompt, **options) as tracer:
                wanted = tracer.result.save()
            assert any(torch.equal(found, wanted) for found in tokens)


def test_steering(pair):
    vector = torch.randn(128, generator=torch.Generator().manual_seed(1)) * 2

    def block(model):
        with model.steer(vector, 1, strength=2.0), steps(model, PROMPTS[0], 5) as tracer:
            tokens = tracer.result.save()
        return [tokens]

    both(pair, block)
