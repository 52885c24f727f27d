"""Interventions as data, on an engine and on `LanguageModel`: the same tokens and values, without a block at each step."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nnsight.errors import EditError, InputError, NamesError, OutOfOrderError
from nnsight.experiments import Intervention, InterventionSpec

TOWER, FRANCE, COLOSSEUM = "The Eiffel Tower is in the city of", "The capital of France is", "The Colosseum"
LONG = " ".join([TOWER] * 4)  # more tokens than a step of the tight engine holds
PROMPTS = (TOWER, FRANCE, COLOSSEUM, LONG)
COUNT = 8


def vector(seed=0, size=128):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def spec(*parts, **options):
    return InterventionSpec(Intervention(*parts, **options))


NOTHING = spec("resid_post[1]", "scale", factor=1.0)
SPECS = {
    "add": spec("resid_post[1]", "add", value=vector(), factor=2.0),
    "scale": spec("resid_post[1]", "scale", factor=-0.5),
    "zero": spec("mlp_out[0]", "zero"),
    "set": spec("attn_out[1]", "set", value=vector(1)),
    "project out": spec("resid_pre[1]", "project_out", value=torch.stack([vector(2), vector(3)])),
    "trained": spec("resid_pre[2]", "trained", value=vector(4).requires_grad_()),
    "swap": spec("resid_post[1]", "swap", prompt=COLOSSEUM, positions=[0, 1]),
    "some positions": spec("resid_post[0]", "add", value=torch.stack([vector(5), vector(6)]), positions=[1, -1]),
    "the last positions": spec("resid_post[0]", "scale", factor=3.0, positions="last"),
    "some steps": spec("resid_post[0]", "add", value=vector(7), steps=[1, 3]),
    "the first row": spec("resid_post[0]", "add", value=vector(7), rows=[0]),
    "a path": spec("transformer.h.1.mlp", "scale", factor=-1.0),
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


_expected = {}


def expected(pair, chosen, prompt, count=COUNT):
    key = (chosen, str(prompt), count)
    if key not in _expected:
        _expected[key] = plainly(pair, chosen, prompt, count)
    return _expected[key]


def plainly(pair, chosen, prompt, count):
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


# --- asked of the worker -------------------------------------------------------------------------------------------


def count_replaced(worker):
    return sum("forward" in vars(module) for module in worker.model_runner.model.modules())


def count_visits(worker):
    """How many calls of modules went by lanes since this was asked last, in how many modules ours stood at most."""
    from nnsight.vllm._engine import Engine

    if not hasattr(Engine, "visits"):
        call, install, Engine.most = Engine._call, Engine._install, 0

        def counted_call(engine, *args):
            Engine.visits += len(engine._lanes)
            return call(engine, *args)

        def counted_install(engine):
            install(engine)
            Engine.most = max(Engine.most, len(engine._replaced))

        Engine._call, Engine._install = counted_call, counted_install
    found = getattr(Engine, "visits", 0), Engine.most
    Engine.visits = Engine.most = 0
    return found


def count_again(worker):
    """How many requests with a spec were computed from their start again since this was asked last."""
    from nnsight.vllm._specs import Specs

    if not hasattr(Specs, "again"):
        begin = Specs.begin_step

        def counted(specs):
            begin(specs)
            computed = specs._runner.input_batch.num_computed_tokens_cpu
            for row, entry in enumerate(specs._entries):
                if entry is not None:
                    Specs.again += computed[row] <= getattr(entry, "seen", -1)
                    entry.seen = computed[row]

        Specs.begin_step = counted
    found, Specs.again = getattr(Specs, "again", 0), 0
    return found


def count_computed(worker):
    """How many tokens of requests with a spec the model has seen in prefills."""
    from nnsight.vllm._specs import Specs

    if not hasattr(Specs, "computed"):
        plan, Specs.computed = Specs._plan, 0

        def counted(specs, bounds, computed):
            for row, entry in enumerate(specs._entries):
                if entry is not None:
                    Specs.computed += max(min(entry.length - computed[row], bounds[row + 1] - bounds[row]), 0)
            return plan(specs, bounds, computed)

        Specs._plan = counted
    return Specs.computed


def watch(worker):
    """Keep what the last norm returns from here on."""
    kept = worker.kept = []
    norm = worker.model_runner.model.transformer.ln_f
    worker.handle = norm.register_forward_hook(lambda _module, _args, output: kept.append(output.tolist()))


def watched(worker):
    worker.handle.remove()
    return [row for rows in worker.kept for row in rows]


def together(model, calls):
    """The results of functions that trace at the same time: their requests are computed in the same batches."""
    model.dispatch()
    with ThreadPoolExecutor(len(calls)) as pool:
        return [one.result() for one in [pool.submit(call) for call in calls]]


def rpc(model, function):
    """What a function gives in the engine's worker."""
    running = model._client.running()
    return running.call(running.llm.collective_rpc(function)).result()[0]


def again(model):
    return rpc(model, count_again)


def computed(model):
    return rpc(model, count_computed)


def replaced(model):
    return rpc(model, count_replaced)


def visits(model):
    return rpc(model, count_visits)


@pytest.fixture(autouse=True, scope="module")
def functions_to_workers():
    """Functions of this file may be sent to the worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        yield


@pytest.fixture(params=[True, False], ids=["cached prefixes", "no cache"], scope="module")
def tight(engines, request):
    """An engine that cuts prompts; its memory holds few requests at a time."""
    memory = {"block_size": 32, "num_gpu_blocks_override": 6}
    return engines("gpt2", max_num_batched_tokens=32, enable_prefix_caching=request.param, **memory)


class TestTokens:
    @pytest.mark.parametrize("name", SPECS)
    def test_alone(self, tight, name):
        model, chosen = tight.engine, SPECS[name]
        wanted = [expected(tight, chosen, prompt) for prompt in PROMPTS]
        with model.apply(chosen):
            visits(model)
            first, second = generated(model, PROMPTS), generated(model, PROMPTS)
            seen = visits(model)
        assert first == wanted
        assert second == wanted
        if name != "swap":  # whose own prompt is run with a block
            assert seen[0] == 0
            assert 0 < seen[1] <= 3  # the model, and the places of the spec
        assert replaced(model) == 0

    def test_they_differ_from_the_plain_model(self, tight):
        plain = generated(tight.engine, PROMPTS)
        different = [name for name, one in SPECS.items() if [expected(tight, one, p) for p in PROMPTS] != plain]
        assert set(SPECS) - set(different) <= {"swap"}

    @pytest.mark.parametrize("prompt", [TOWER, LONG], ids=["short", "long"])
    def test_each_with_its_own(self, tight, prompt):
        """Requests with different specs, and with none, in one batch."""
        alone = [one for name, one in SPECS.items() if name != "swap"]  # which has a request of its own before
        chosen = [*alone, NOTHING, spec("resid_post[1]", "scale", factor=-0.6), spec("mlp_out[0]", "zero")]
        models = [tight.engine, *(tight.engine.edit(one) for one in chosen)]
        found = together(tight.engine, [lambda model=model: generated(model, [prompt])[0] for model in models])
        assert found == [expected(tight, one, prompt) for one in (NOTHING, *chosen)]
        assert replaced(tight.engine) == 0

    def test_values(self, tight):
        """What leaves the model, chunk by chunk."""
        for name in ("add", "project out", "some positions", "several at a place"):
            with tight.plain.apply(SPECS[name]), tight.plain.trace(LONG):
                wanted = tight.plain.final_norm.output.save()
            rpc(tight.engine, watch)
            if name != "add":  # a prefix that was cached would not be seen
                running = tight.engine._client.running()
                assert running.call(running.llm.reset_prefix_cache()).result()
            with tight.engine.apply(SPECS[name]):
                generated(tight.engine, [LONG], 1)
            values = torch.tensor(rpc(tight.engine, watched))
            torch.testing.assert_close(values, wanted[0, -len(values) :], atol=1e-4, rtol=1e-4)
            assert len(values) in (len(wanted[0]), len(wanted[0]) - 32)

    def test_memory_runs_out(self, tight):
        """A request that is taken out and computed again gets its spec again."""
        model, chosen, prompts = tight.engine, SPECS["several at a place"], [" ".join([TOWER] * 3)] * 2 + [LONG] * 2
        wanted = {prompt: expected(tight, chosen, prompt, 30) for prompt in set(prompts)}
        again(model)
        with model.apply(chosen):
            assert generated(model, prompts, 30) == [wanted[prompt] for prompt in prompts]
        assert again(model)


class TestCachedPrefixes:
    """Tokens that one spec has changed are found by requests with the same one, and by no others."""

    @pytest.fixture
    def cached(self, tight):
        if not tight.engine._client._options["enable_prefix_caching"]:
            pytest.skip("nothing is cached")
        return tight

    def hits(self, model, chosen, prompt):
        """The tokens of the prompt that were not computed, and what came of it."""
        before = computed(model)
        with model.apply(chosen):
            found = generated(model, [prompt], 2)[0]
        return len(found) - 2 - (computed(model) - before), found

    def test_equal_specs_share(self, cached):
        def made():
            return spec("resid_post[1]", "add", value=vector(20))

        cold, first = self.hits(cached.engine, made(), LONG)
        warm, second = self.hits(cached.engine, made(), LONG)
        assert (cold, warm) == (0, 32)
        assert first == second == expected(cached, made(), LONG, 2)

    @pytest.mark.parametrize("other", ["value", "factor", "layer", "site", "operation", "positions", "steps", "none"])
    def test_others_do_not(self, cached, other):
        options = {"value": vector(21), "factor": 2.0}
        site, operation = "resid_post[1]", "add"
        self.hits(cached.engine, spec(site, operation, **options), LONG)
        site = {"layer": "resid_post[2]", "site": "attn_out[1]"}.get(other, site)
        operation = "set" if other == "operation" else operation
        options |= {"value": {"value": vector(22)}, "factor": {"factor": 3.0}}.get(other, {})
        options |= {"positions": {"positions": [0]}, "steps": {"steps": [1]}}.get(other, {})
        if operation == "set":
            del options["factor"]
        if other == "none":
            plain = cached.engine.trace(LONG, trace=False, max_tokens=2)[0]
            with cached.plain.generate(LONG, max_new_tokens=2, do_sample=False) as tracer:
                tokens = tracer.result.save()
            assert list(plain.outputs[0].token_ids) == tokens[0, -2:].tolist()
            return
        chosen = spec(site, operation, **options)
        count, found = self.hits(cached.engine, chosen, LONG)
        assert count == 0
        assert found == expected(cached, chosen, LONG, 2)

    def test_positions_counted_from_the_end(self, cached):
        """A longer prompt that begins alike has other tokens there."""
        ids = cached.plain.tokenizer(LONG)["input_ids"]
        chosen = spec("resid_post[1]", "add", value=vector(23), positions=[-5])
        for prompt in (ids[:35], ids):
            count, found = self.hits(cached.engine, chosen, prompt)
            assert count == 0
            assert found == expected(cached, chosen, torch.tensor([prompt]), 2)


class TestStored:
    def test_edit(self, tight):
        edited = tight.engine.edit(SPECS["add"])
        visits(tight.engine)
        assert generated(edited, PROMPTS) == [expected(tight, SPECS["add"], prompt) for prompt in PROMPTS]
        assert visits(tight.engine)[0] == 0

    def test_steer(self, tight):
        wanted = [expected(tight, spec("resid_post[2]", "add", value=vector(11) * 2), prompt) for prompt in PROMPTS]
        visits(tight.engine)
        with tight.engine.steer(vector(11), 2, strength=2.0):
            assert generated(tight.engine, PROMPTS) == wanted
        assert generated(tight.engine.steer(vector(11), 2, strength=2.0).model, PROMPTS) == wanted
        assert visits(tight.engine)[0] == 0

    def test_beside_a_stored_block(self, tight):
        def tokens(model, **options):
            edited = model.edit(SPECS["scale"])
            with edited.edit(inplace=True):
                edited.resid_post[1][:] += 2.0
            edited = edited.edit(SPECS["zero"])
            with edited.generate(TOWER, **options) as tracer:
                found = tracer.result.save()
            return found[0].tolist()

        found = tokens(tight.engine, max_tokens=4, min_tokens=4)
        assert found == tokens(tight.plain, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    def test_swap_has_the_edits_before_it(self, tight):
        def tokens(model, **options):
            edited = model.edit(SPECS["add"]).edit(SPECS["swap"])
            with edited.generate(TOWER, **options) as tracer:
                found = tracer.result.save()
            return found[0].tolist()

        found = tokens(tight.engine, max_tokens=4, min_tokens=4)
        assert found == tokens(tight.plain, max_new_tokens=4, min_new_tokens=4, do_sample=False)


class TestBlocks:
    """A request with a spec and a block: the block sees what the spec has made."""

    @pytest.mark.parametrize("name", ["add", "several at a place", "some positions"])
    def test_reads(self, tight, name):
        def values(model):
            with model.apply(SPECS[name]), model.trace(TOWER):
                found = [model.resid_pre[1].save(), model.resid_post[1].save(), model.logits.save()]
            return found

        for found, wanted in zip(values(tight.engine), values(tight.plain), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert replaced(tight.engine) == 0

    def test_edits_at_each_step(self, tight):
        def tokens(model, **options):
            with model.apply(SPECS["scale"]), model.generate(TOWER, **options) as tracer:
                for _ in tracer.iter[:]:
                    model.resid_post[1][:] += 1.5
                found = tracer.result.save()
            return found[0].tolist()

        found = tokens(tight.engine, max_tokens=COUNT, min_tokens=COUNT)
        assert found == tokens(tight.plain, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)

    def test_in_one_batch_with_specs_alone(self, tight):
        model = tight.engine
        with model.apply(SPECS["add"]), model.trace(max_tokens=COUNT, min_tokens=COUNT) as tracer:
            with tracer.invoke(LONG):
                first = tracer.result.save()
            with tracer.invoke(TOWER):
                stream = model.resid_post[1].save()
                second = tracer.result.save()
            with tracer.invoke(FRANCE):
                third = tracer.result.save()
        found = [tokens[0].tolist() for tokens in (first, second, third)]
        assert found == [expected(tight, SPECS["add"], prompt) for prompt in (LONG, TOWER, FRANCE)]
        with tight.plain.apply(SPECS["add"]), tight.plain.trace(TOWER):
            wanted = tight.plain.resid_post[1].save()
        torch.testing.assert_close(stream, wanted, atol=1e-4, rtol=1e-4)

    def test_a_cache(self, tight):
        model = tight.engine
        with model.apply(SPECS["add"]), model.trace(TOWER) as tracer:
            cache = tracer.cache(modules=["transformer.h.1"])
        with tight.plain.apply(SPECS["add"]), tight.plain.trace(TOWER):
            wanted = tight.plain.resid_post[1].save()
        torch.testing.assert_close(cache["model.transformer.h.1"].output[0], wanted, atol=1e-4, rtol=1e-4)

    def test_a_read_after_the_result(self, tight):
        model = tight.engine
        with pytest.raises(OutOfOrderError), model.apply(SPECS["add"]), model.trace(TOWER, max_tokens=2) as tracer:
            tokens = tracer.result.save()
            stream = model.resid_post[1].save()


class TestByCode:
    """What has no form for a whole batch is done as a block would do it."""

    @pytest.mark.parametrize(
        "chosen",
        [
            spec("transformer.h.1.ln_2", "scale", factor=0.5),
            InterventionSpec(SPECS["add"][0], Intervention("transformer.h.1.mlp.c_fc", "zero", positions="last")),
        ],
        ids=["a norm", "beside another"],
    )
    def test_it(self, tight, chosen):
        visits(tight.engine)
        with tight.engine.apply(chosen):
            found = generated(tight.engine, PROMPTS[:3])
        assert visits(tight.engine)[0] > 0
        assert found == [expected(tight, chosen, prompt) for prompt in PROMPTS[:3]]

    def test_logits(self, tight):
        chosen = spec("logits", "add", value=torch.nn.functional.one_hot(torch.tensor(77), 1309) * 1e3)
        with tight.engine.apply(chosen):
            found = generated(tight.engine, [TOWER])[0]
        assert found[-COUNT:] == [77] * COUNT


class TestRefused:
    @pytest.mark.parametrize(
        ("chosen", "error", "match"),
        [
            (
                spec("resid_post[1]", "add", value=vector(), positions=[7]),
                InputError,
                "5 tokens, and none at position 7",
            ),
            (spec("resid_post[1]", "add", value=vector(size=64)), InputError, r"is \[64\]; there it is \[128\]"),
            (spec("resid_post[1]", "add", value=vector(), rows=[1]), InputError, "there is no row 1"),
            (spec("resid_post[1]", "add", value=vector(), heads=[1]), InputError, "has no heads"),
            (spec("resid_mid[1]", "zero"), EditError, "change attn_out"),
            (spec("head_z[1]", "zero"), NamesError, "inside vLLM's kernels"),
        ],
    )
    def test_what_does_not_fit(self, tight, chosen, error, match):
        for _ in range(2):
            with pytest.raises(error, match=match), tight.engine.apply(chosen):
                generated(tight.engine, [FRANCE])
        assert generated(tight.engine, [FRANCE])[0] == expected(tight, NOTHING, FRANCE)
        assert replaced(tight.engine) == 0
