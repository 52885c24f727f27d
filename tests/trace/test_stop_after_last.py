"""`stop_after_last=True`: the same values as in the whole forward, and nothing of the model runs after the last of them."""

import pytest
import torch
from torch.nn import Linear, Sequential

from nnsight import NNsight
from nnsight.errors import InputError, NeverRanError, NoInputError, NotTracingError, WaitError
from nnsight.experiments import Intervention, InterventionSpec

IDS = [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.fixture
def ran(tiny):
    """The names of the modules whose forward has ended, as the model's own hooks see it."""
    names, module = [], tiny._model

    def note(name):
        return lambda *_: names.append(name)

    handles = [inner.register_forward_hook(note(name)) for name, inner in module.named_modules()]
    before = [dict(vars(inner)) for inner in module.modules()]
    yield names
    assert [dict(vars(inner)) for inner in module.modules()] == before
    for handle in handles:
        handle.remove()


def full(model, read, *inputs, **options):
    with model.trace(*(inputs or (IDS,)), **options):
        return read()


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_read(tiny, ran, layer, times):
    expected = full(tiny, lambda: tiny.transformer.h[layer].output.clone())
    for _ in range(times):  # the first trace of a model is another one than those that follow
        ran.clear()
        with tiny.trace(IDS, stop_after_last=True):
            hidden = tiny.transformer.h[layer].output.save()
        assert torch.equal(hidden, expected)
        blocks = [name for name in ran if name.startswith("transformer.h.") and name.count(".") == 2]
        assert blocks == [f"transformer.h.{i}" for i in range(layer + 1)]
        assert "lm_head" not in ran


def test_the_first_trace_of_a_model():
    torch.manual_seed(0)
    net, x = Sequential(Linear(4, 4), Linear(4, 4), Linear(4, 4)), torch.rand(2, 4)
    model, calls = NNsight(net), []
    net[1].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        with model.trace(x, stop_after_last=True):
            hidden = model[0].output
        assert torch.equal(hidden, net[0](x))
    assert calls == []
    assert torch.equal(full(model, lambda: model.output, x), net(x))


def test_edits_count_up_to_the_last_request(tiny, ran):
    def read():
        tiny.transformer.h[0].output[0][:, 1] = 0
        return tiny.transformer.h[1].mlp.output.clone()

    expected = full(tiny, read)
    ran.clear()
    with tiny.trace(IDS, stop_after_last=True):
        hidden = read()
    assert torch.equal(hidden, expected)
    assert "transformer.h.1" not in ran


def test_a_read_out_of_order(tiny, ran):
    def read():
        late = tiny.transformer.h[2].attn.output[0].clone()
        return late, tiny.transformer.h[1].output.clone()

    with pytest.warns(match="second"):
        expected = full(tiny, read)
    ran.clear()
    with pytest.warns(match="second"):
        with tiny.trace(IDS, stop_after_last=True):
            values = read()
    assert all(torch.equal(one, other) for one, other in zip(values, expected, strict=True))
    assert "transformer.h.2" not in ran


def test_nothing_is_asked_for(tiny, ran):
    with tiny.trace(IDS, stop_after_last=True):
        pass
    assert ran == []
    with pytest.raises(NoInputError):
        with tiny.trace(stop_after_last=True):
            tiny.lm_head.output


def test_gradients(tiny, ran):
    with tiny.trace(IDS):
        hidden = tiny.transformer.h[0].output
        loss = tiny.transformer.h[1].output.sum()
        with loss.backward():
            expected = hidden.grad.clone()
    ran.clear()
    with tiny.trace(IDS, stop_after_last=True):
        hidden = tiny.transformer.h[0].output
        loss = tiny.transformer.h[1].output.sum()
        with loss.backward():
            gradient = hidden.grad.clone()
    assert torch.equal(gradient, expected)
    assert "transformer.h.2.ln_1" not in ran


def test_operations_of_a_source(tiny, ran):
    def read():
        return tiny.transformer.h[1].attn.source.self_c_proj_0.output.clone()

    expected = full(tiny, read)
    ran.clear()
    with tiny.trace(IDS, stop_after_last=True):
        value = read()
    assert torch.equal(value, expected)
    assert "transformer.h.1.attn" not in ran


def test_the_vocabulary(tiny, ran):
    expected = full(tiny, lambda: tiny.heads[1].pattern.clone())
    ran.clear()
    with tiny.trace(IDS, stop_after_last=True):
        pattern = tiny.heads[1].pattern.clone()
    assert torch.equal(pattern, expected)
    assert "transformer.h.1" not in ran


# --- several blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["first", "second"])
def test_invokes_are_all_waited_for(tiny, ran, last):
    one, two = (2, 0) if last == "first" else (0, 2)
    expected = [full(tiny, lambda i=i, n=n: tiny.transformer.h[n].output, [IDS[i]]) for i, n in ((0, one), (1, two))]
    full(tiny, lambda: tiny.lm_head.output)
    with tiny.trace(stop_after_last=True) as tracer:  # learns the layouts, in forwards of its own
        with tracer.invoke([IDS[0]]):
            first = tiny.transformer.h[one].output.save()
        with tracer.invoke([IDS[1]]):
            second = tiny.transformer.h[two].output.save()
    torch.testing.assert_close([first + 0, second + 0], [value + 0 for value in expected])
    ran.clear()
    with tiny.trace(stop_after_last=True) as tracer:
        with tracer.invoke([IDS[0]]):
            again = tiny.transformer.h[one].output.save()
        with tracer.invoke([IDS[1]]):
            tiny.transformer.h[two].output
    assert torch.equal(again, first)
    assert "transformer.h.1" in ran
    assert "lm_head" not in ran


def test_invokes_that_share_a_value(tiny, ran):
    with tiny.trace(stop_after_last=True) as tracer:
        with tracer.invoke([IDS[0]]):
            donor = tiny.transformer.h[0].output
        with tracer.invoke([IDS[1]]):
            tiny.transformer.h[0].output[:] = donor
            hidden = tiny.transformer.h[1].output.save()
    torch.testing.assert_close(hidden + 0, full(tiny, lambda: tiny.transformer.h[1].output, [IDS[0]]) + 0)


def test_an_invoke_without_requests(tiny, ran):
    found = []
    with tiny.trace(stop_after_last=True) as tracer:
        with tracer.invoke([IDS[0]]):
            found.append("ran")
    assert found == ["ran"]
    assert ran == []


def test_a_barrier_that_cannot_open(tiny):
    with pytest.raises(WaitError):
        with tiny.trace(stop_after_last=True) as tracer:
            meet = tracer.barrier(2)
            with tracer.invoke([IDS[0]]):
                meet()
            with tracer.invoke([IDS[1]]):
                pass


# --- lasting edits --------------------------------------------------------------------------------------------


def test_lasting_edits_count_up_to_the_last_request(tiny, ran):
    seen = []
    with tiny.edit() as edited:
        tiny.transformer.h[0].output[:] = 0
        tiny.transformer.h[2].output[:] = 1
        seen.append("later")
    expected = full(edited, lambda: edited.transformer.h[1].output.clone())
    assert seen == ["later"]
    seen.clear()
    ran.clear()
    with edited.trace(IDS, stop_after_last=True):
        hidden = edited.transformer.h[1].output.save()
    assert torch.equal(hidden, expected)
    assert not torch.equal(hidden, full(tiny, lambda: tiny.transformer.h[1].output))
    assert seen == []
    ran.clear()
    with edited.trace(IDS, stop_after_last=True):
        pass
    assert ran == []


def test_a_stop_is_not_held_up_by_lasting_edits(tiny, ran):
    with tiny.edit() as edited:
        tiny.transformer.h[0].output[:] = 0
    with edited.trace(IDS) as tracer:
        hidden = edited.transformer.h[1].output.save()
        tracer.stop()
    assert torch.equal(hidden, full(edited, lambda: edited.transformer.h[1].output))
    ran.clear()
    with edited.trace(IDS) as tracer:
        edited.transformer.h[1].output
        tracer.stop()
    assert "transformer.h.2" not in ran


def test_interventions_as_data(tiny, ran):
    spec = InterventionSpec(Intervention("mlp_out[0]", "zero"))
    with tiny.apply(spec):
        expected = full(tiny, lambda: tiny.transformer.h[1].output.clone())
        ran.clear()
        with tiny.trace(IDS, stop_after_last=True):
            hidden = tiny.transformer.h[1].output.save()
    assert torch.equal(hidden, expected)
    assert "transformer.h.2" not in ran


# --- caches ---------------------------------------------------------------------------------------------------


def test_a_cache_of_named_modules_is_complete(tiny, ran):
    expected = full(tiny, lambda: tiny.transformer.h[1].output.clone())
    ran.clear()
    with tiny.trace(IDS, stop_after_last=True) as tracer:
        cache = tracer.cache(modules=[tiny.transformer.h[1], tiny.transformer.h[0].mlp])
    assert cache.keys() == ["model.transformer.h.0.mlp", "model.transformer.h.1"]
    assert torch.equal(cache["transformer.h.1"].output, expected)
    assert "transformer.h.2.ln_1" not in ran
    with tiny.trace(IDS, stop_after_last=True) as tracer:
        cache = tracer.cache(modules=["transformer.h.1"])
        tiny.transformer.h[2].output
    assert cache.keys() == ["model.transformer.h.1"]


def test_a_cache_in_an_invoke_is_complete(tiny, ran):
    with tiny.trace(stop_after_last=True) as tracer:
        with tracer.invoke([IDS[0]]):
            first = tiny.transformer.h[0].output
        with tracer.invoke([IDS[1]]):
            cache = tracer.cache(modules=["transformer.h.1"])
    expected = full(tiny, lambda: tiny.transformer.h[1].output, [IDS[1]])
    torch.testing.assert_close(cache["transformer.h.1"].output + 0, expected + 0)


def test_a_cache_of_everything_takes_the_whole_forward(tiny, ran):
    with tiny.trace(IDS, stop_after_last=True) as tracer:
        cache = tracer.cache()
        tiny.transformer.h[0].output
    assert "model.lm_head" in cache
    assert "lm_head" in ran


def test_a_cache_holds_every_call_of_a_module():
    torch.manual_seed(0)
    inner, last = Linear(4, 4), Linear(4, 4)
    model, x, ends = NNsight(Sequential(inner, inner, inner, last)), torch.rand(2, 4), []
    last.register_forward_hook(lambda *_: ends.append(1))
    for number in range(3):
        with model.trace(x, stop_after_last=True) as tracer:
            cache = tracer.cache(modules=["0"])
        assert len(cache["0"].calls) == 3
        assert len(ends) == 1, number  # how often it is called is known after the first trace
    assert torch.equal(cache["0"].calls[2].output, inner(inner(inner(x))))


def test_a_cached_module_that_never_runs(tiny):
    class Idle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = Linear(4, 4), Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = NNsight(Idle())
    with model.trace(torch.rand(2, 4), stop_after_last=True) as tracer:
        cache = tracer.cache(modules=["unused"])
    with pytest.raises(NeverRanError, match="unused: it did not run"):
        cache["unused"].output


def test_a_stop_does_not_wait_for_a_cache(tiny, ran):
    full(tiny, lambda: tiny.lm_head.output)
    ran.clear()
    with tiny.trace(IDS, stop_after_last=True) as tracer:
        cache = tracer.cache(modules=["transformer.h.2"])
        tiny.transformer.h[0].output
        tracer.stop()
    assert len(cache) == 0
    assert "transformer.h.1" not in ran


# --- the result, generations, scans ---------------------------------------------------------------------------


def test_the_result_is_a_request_for_the_whole_forward(tiny, ran):
    with tiny.trace(IDS, stop_after_last=True) as tracer:
        result = tracer.result.save()
    assert torch.equal(result.logits, tiny._model(torch.tensor(IDS)).logits)
    with tiny.trace(IDS, stop_after_last=True) as tracer:
        tiny.transformer.h[0].output
    with pytest.raises(NotTracingError, match="inside the `with` block"):
        tracer.result


def test_a_generation_ends_too(tiny, ran):
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with tiny.generate(IDS, **options) as tracer:
        expected = [tiny.transformer.h[1].output.clone() for _ in tracer.iter[:2]]
        ids = tiny.generator.output.save()
    ran.clear()
    with tiny.generate(IDS, stop_after_last=True, **options) as tracer:
        hidden = [tiny.transformer.h[1].output.clone() for _ in tracer.iter[:2]]
    assert all(torch.equal(one, other) for one, other in zip(hidden, expected, strict=True))
    assert ran.count("lm_head") == 1
    with tiny.generate(IDS, stop_after_last=True, **options) as tracer:
        tiny.transformer.h[1].output
        cache = tracer.cache(modules=["lm_head"])
        assert torch.equal(tiny.generator.output, ids)
    assert len(cache["lm_head"].calls) == 5


def test_a_cache_of_a_generation_is_complete(tiny):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with tiny.generate(IDS, stop_after_last=True, **options) as tracer:
        cache = tracer.cache(modules=["transformer.h.0"])
    assert [call.step for call in cache["transformer.h.0"].calls] == [0, 1, 2]


def test_generating_for_invokes(tiny):
    with pytest.raises(InputError, match="with a block of its own"):
        with tiny.trace() as tracer:
            with tracer.invoke([IDS[0]]):
                pass
            tiny.generate(max_new_tokens=2, stop_after_last=True)


def test_a_scan_ends_too(tiny, ran):
    with tiny.scan(IDS, stop_after_last=True):
        shape = tiny.transformer.h[0].output.shape
    assert shape == (2, 4, 32)
    assert "transformer.h.1" not in ran


def test_without_a_block(tiny):
    for call in (tiny.trace, tiny.generate, NNsight(tiny._model).trace):
        with pytest.raises(InputError, match="trace=False"):
            call(IDS, trace=False, stop_after_last=True)


# --- errors ---------------------------------------------------------------------------------------------------


def test_errors_of_the_body(tiny, ran):
    with pytest.raises(ZeroDivisionError, match="mine"):
        with tiny.trace(IDS, stop_after_last=True):
            tiny.transformer.h[0].output
            raise ZeroDivisionError("mine")
    with pytest.raises(ZeroDivisionError, match="mine"):
        with tiny.trace(stop_after_last=True) as tracer:
            with tracer.invoke(IDS):
                tiny.transformer.h[0].output
                raise ZeroDivisionError("mine")


def test_a_request_that_is_never_served(tiny):
    with pytest.raises(NeverRanError):
        with tiny.trace(stop_after_last=True) as tracer:
            with tracer.invoke(IDS):
                tiny.transformer.h[0].next(5).output


def test_errors_of_the_model_before_the_last_request(tiny):
    def fail(*_):
        raise ZeroDivisionError("mine")

    handle = tiny._model.transformer.h[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError, match="mine"):
        with tiny.trace(IDS, stop_after_last=True):
            tiny.transformer.h[2].output
    with tiny.trace(IDS, stop_after_last=True):
        hidden = tiny.transformer.h[0].output
    assert hidden.shape == (2, 4, 32)
    handle.remove()
