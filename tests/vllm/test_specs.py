"""Interventions as data, on an engine and on `LanguageModel`: the same tokens and values, without a block at each step."""

import pytest
import torch

from nnsight.errors import EngineError, InputError, NamesError, NNsightError, OutOfOrderError
from nnsight.experiments import Intervention, InterventionSpec

TOWER, FRANCE, COLOSSEUM = "The Eiffel Tower is in the city of", "The capital of France is", "The Colosseum"
PROMPTS = (TOWER, FRANCE, COLOSSEUM, " ".join([TOWER] * 3))
COUNT = 8


def vector(seed=0, size=128, scale=3.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def spec(*parts, **options):
    return InterventionSpec(Intervention(*parts, **options))


SPECS = {
    "add": spec("resid_post[1]", "add", value=vector(), factor=2.0),
    "scale": spec("resid_post[1]", "scale", factor=-0.5),
    "zero": spec("mlp_out[0]", "zero"),
    "set": spec("attn_out[1]", "set", value=vector(1)),
    "project out": spec("resid_pre[1]", "project_out", value=torch.stack([vector(2), vector(3)])),
    "trained": spec("resid_pre[2]", "trained", value=vector(4).requires_grad_()),
    "some positions": spec("resid_post[0]", "add", value=torch.stack([vector(5), vector(6)]), positions=[1, -1]),
    "the last ones": spec("resid_post[0]", "scale", factor=3.0, positions="last"),
    "some steps": spec("resid_post[0]", "add", value=vector(7), steps=[1, 3]),
    "a path": spec("layers.1.mlp", "scale", factor=-1.0),
    "around the layers": InterventionSpec(
        Intervention("embed", "add", value=vector(8)), Intervention("final_norm", "scale", factor=-1.0)
    ),
    "several at a place": InterventionSpec(
        Intervention("resid_post[1]", "scale", factor=0.3),
        Intervention("resid_post[1]", "add", value=vector(9), positions=[0]),
        Intervention("resid_post[1]", "add", value=vector(9)),
        Intervention("mlp_out[1]", "zero", positions="last"),
        Intervention("resid_post[1]", "project_out", value=vector(10)),
    ),
}


def expected(pair, chosen, prompt, count=COUNT):
    options = {"max_new_tokens": count, "do_sample": False, "min_new_tokens": count}
    with pair.plain.apply(chosen), pair.plain.generate(prompt, **options) as tracer:
        tokens = tracer.result.save()
    return tokens[0].tolist()


def generated(model, prompts, count=COUNT):
    """The tokens of each prompt, as requests of one batch."""
    found = {}
    with model.trace(max_tokens=count, min_tokens=count) as tracer:
        for number, prompt in enumerate(prompts):
            with tracer.invoke(prompt):
                found[number] = tracer.result.save()
    return [found[number][0].tolist() for number in range(len(prompts))]


def installed(model):
    """What stands in the modules of the worker: none of ours outside of requests."""
    return model._engine.collective_rpc(count_replaced)[0]


def count_replaced(worker):
    return sum("forward" in vars(module) for module in worker.model_runner.model.modules())


def lanes(model):
    """How often a block was visited in the worker since the last call."""
    return model._engine.collective_rpc(count_lanes)[0]


def count_lanes(worker):
    from nnsight.vllm._engine import Engine

    if not hasattr(Engine, "visited"):
        plain, Engine.visited = Engine._call, 0

        def counted(engine, *args):
            Engine.visited += 1
            return plain(engine, *args)

        Engine._call = counted
    visited, Engine.visited = Engine.visited, 0
    return visited


@pytest.fixture(autouse=True)
def local_workers(monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


def test_it(engines):
    pair = engines("gpt2", max_num_batched_tokens=32)
    print(installed(pair.engine))
    lanes(pair.engine)
    for name, chosen in SPECS.items():
        if name == "a path":
            continue
        with pair.engine.apply(chosen):
            f = generated(pair.engine, PROMPTS)
        e = [expected(pair, chosen, p) for p in PROMPTS]
        print(name, f == e, lanes(pair.engine), [] if f == e else (f, e))
    print(installed(pair.engine))
