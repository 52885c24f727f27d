"""A cache holds what plain hooks see, per call and per invoke, and costs only what it names."""

import gc
import weakref

import pytest
import torch
from torch.nn import Linear, Module, ModuleList, ReLU, Sequential

from nnsight import LanguageModel, NNsight
from nnsight.errors import (
    EditError,
    InputError,
    NeverRanError,
    NotTracingError,
    RowsError,
    SavedValueChangedWarning,
    UnknownPathError,
)

IDS = [[1, 2, 3, 4], [5, 6, 7, 8]]


def net():
    torch.manual_seed(0)
    return Sequential(Linear(5, 10), ReLU(), Linear(10, 2))


def hooked(module, call):
    """What each module is called with and returns, copied, by path."""
    seen, handles = {}, []
    for name, inner in module.named_modules(prefix="model"):

        def look(_, args, kwargs, output, name=name):
            seen.setdefault(name, []).append((args, kwargs, copied(output)))

        handles.append(inner.register_forward_hook(look, with_kwargs=True))
    result = call()
    for handle in handles:
        handle.remove()
    return seen, result


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return tuple(copied(item) for item in value)
    return {name: copied(item) for name, item in value.items()} if isinstance(value, dict) else value


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a.detach(), b.detach())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return type(a) is type(b)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.rand(3, 5)


class TestValues:
    def test_all_modules(self, x):
        module = net()
        seen, _ = hooked(module, lambda: module(x))
        model = NNsight(module)
        for _ in range(2):
            with model.trace(x) as tracer:
                cache = tracer.cache()
            assert cache.keys() == ["model", "model.0", "model.1", "model.2"]
            for path, [(_, _, output)] in seen.items():
                assert torch.equal(cache[path].output, output)

    def test_inputs(self, x):
        module = net()
        seen, _ = hooked(module, lambda: module(x))
        with NNsight(module).trace(x) as tracer:
            cache = tracer.cache(include_inputs=True)
            inputs_only = tracer.cache(include_output=False, include_inputs=True)
        for path, [(args, kwargs, _)] in seen.items():
            assert same(cache[path].inputs, (args, kwargs))
            assert torch.equal(cache[path].input, args[0])
            assert torch.equal(inputs_only[path].input, args[0])
            with pytest.raises(NeverRanError, match="include_output=True"):
                inputs_only[path].output

    def test_a_language_model(self, tiny):
        encoded = torch.tensor(IDS)
        seen, _ = hooked(tiny._model, lambda: tiny._model(encoded, attention_mask=torch.ones_like(encoded)))
        with tiny.trace(IDS) as tracer:
            cache = tracer.cache()
        assert set(cache) == set(seen)
        for path, [(_, _, output)] in seen.items():
            assert same(cache[path].output, output), path

    def test_what_is_recorded_is_what_goes_on(self, x):
        model = NNsight(net())
        with model.trace(x) as tracer:
            cache = tracer.cache(include_inputs=True)
            model[0].output[:, 0] = 7
            model[1].input = model[1].input * 2
            model[2].output = torch.zeros(3, 2)
        assert (cache["model.0"].output[:, 0] == 7).all()
        assert (cache["model.1"].input[:, 0] == 14).all()
        assert (cache["model"].output == 0).all()
        assert (cache["model.2"].output == 0).all()

    def test_skipped_modules(self, x):
        model = NNsight(net())
        with model.trace(x) as tracer:
            cache = tracer.cache()
            model[0].skip(torch.ones(3, 10))
        assert (cache["model.0"].output == 1).all()

    def test_hooks_of_the_user_come_first(self, x):
        module = net()
        module[0].register_forward_hook(lambda module, args, output: output + 1)
        with NNsight(module).trace(x) as tracer:
            cache = tracer.cache()
        assert torch.equal(cache["model.0"].output, module[0](x))

    def test_a_module_called_from_the_body_is_not_recorded(self, x):
        model = NNsight(net())
        with model.trace(x) as tracer:
            cache = tracer.cache()
            model[0].output
            model[2](torch.ones(1, 10))
        assert len(cache["model.2"].calls) == 1

    def test_a_second_pass_is_not_recorded(self, x):
        model = NNsight(net())
        with pytest.warns(UserWarning, match="second forward"):
            with model.trace(x) as tracer:
                cache = tracer.cache()
                model.output
                model[0].output
        assert len(cache["model.0"].calls) == 1

    def test_filled_as_the_model_runs(self, x):
        model = NNsight(net())
        with model.trace(x) as tracer:
            cache = tracer.cache()
            assert list(cache) == []
            model[1].output
            assert list(cache) == ["model.0"]
            assert cache["model.0"].output.shape == (3, 10)
        assert set(cache) == {"model", "model.0", "model.1", "model.2"}

    def test_made_late(self, x):
        model = NNsight(net())
        for _ in range(2):
            with model.trace(x) as tracer:
                model[1].output
                cache = tracer.cache(include_inputs=True)
            assert set(cache) == {"model", "model.1", "model.2"}
            assert torch.equal(cache["model"].input, x)
            with pytest.raises(NeverRanError, match="before what the model is to run"):
                cache["model.0"].output

    def test_two_caches(self, x):
        model = NNsight(net())
        with model.trace(x) as tracer:
            first, second = tracer.cache([model[0]]), tracer.cache([model[0], model[2]])
        assert (first.keys(), second.keys()) == (["model.0"], ["model.0", "model.2"])
        assert torch.equal(first["0"].output, second["0"].output)

    def test_ended_by_stop_or_error(self, x):
        model = NNsight(net())
        with model.trace(x) as tracer:
            cache = tracer.cache()
            model[1].output
            tracer.stop()
        assert cache.keys() == ["model.0"]
        with pytest.raises(ValueError, match="mine"):
            with model.trace(x) as tracer:
                cache = tracer.cache()
                model[1].output
                raise ValueError("mine")
        assert cache.keys() == ["model.0"]
        assert cache["model.0"].output.shape == (3, 10)

    def test_under_inference_mode(self, x):
        module = net()
        with torch.inference_mode():
            with NNsight(module).trace(x) as tracer:
                cache = tracer.cache()
        assert torch.equal(cache["model.0"].output, module[0](x))


class TestOptions:
    def test_dtype_and_device(self, tiny):
        with tiny.trace(IDS) as tracer:
            cache = tracer.cache(dtype=torch.float64, device="meta", include_inputs=True)
        block = cache["model.transformer.h.0"]
        assert (block.output.dtype, block.output.device.type) == (torch.float64, "meta")
        assert cache["model.transformer.wte"].input.dtype == torch.int64

    def test_detach(self, x):
        model = NNsight(net())
        with model.trace(x) as tracer:
            detached, attached = tracer.cache(), tracer.cache(detach=False)
            live = model[0].output
        assert not detached["model.0"].output.requires_grad
        assert attached["model.0"].output is live

    def test_copy(self, x):
        model = NNsight(net())
        with model.trace(x) as tracer:
            cache = tracer.cache(copy=True)
            live = model[0].output
        assert cache["model.0"].output.data_ptr() != live.data_ptr()

    def test_modules(self, tiny):
        block = tiny.transformer.h[0]
        for modules in (
            [block, "lm_head"],
            ["model.transformer.h.0", tiny._model.lm_head],
            (m for m in (tiny.lm_head, "transformer.h.0")),
        ):
            with tiny.trace(IDS) as tracer:
                cache = tracer.cache(modules=modules)
            assert set(cache) == {"model.transformer.h.0", "model.lm_head"}

    def test_one_module_or_a_list_of_modules(self, tiny):
        with tiny.trace(IDS) as tracer:
            one, some, blocks = (
                tracer.cache("lm_head"),
                tracer.cache(tiny.transformer.h[1:]),
                tracer.cache(tiny.transformer.h),
            )
        assert one.keys() == ["model.lm_head"]
        assert some.keys() == [f"model.transformer.h.{i}" for i in (1, 2)]
        assert blocks.keys() == [f"model.transformer.h.{i}" for i in range(3)]

    def test_only_named_modules_cost_anything(self, x):
        module = Sequential(net(), net())
        model = NNsight(module)
        with model.trace(x @ torch.ones(5, 5)) as tracer:  # the first trace counts every module
            tracer.stop()
        model._tree.instruments.profile = dict.fromkeys(module.modules(), 1)
        with model.trace(x) as tracer:
            tracer.cache([model[0][0]])
            model[0][1].input
            replaced = [name for name, inner in module.named_modules() if "forward" in vars(inner)]
            tracer.stop()
        assert replaced == ["", "0", "0.0", "0.1", "1"]

    def test_nothing_to_keep(self, x):
        with pytest.raises(InputError, match="include_output"):
            with NNsight(net()).trace(x) as tracer:
                tracer.cache(include_output=False)

    @pytest.mark.parametrize("path", ["model.transformer.h.7", "transformer.hh", "lm_haed"])
    def test_unknown_module(self, tiny, path):
        with pytest.raises(UnknownPathError, match=r"closest are: model\."):
            with tiny.trace(IDS) as tracer:
                tracer.cache([path])

    def test_module_of_another_model(self, tiny, x):
        other = NNsight(net())
        for module in (other[0], other._model[0]):
            with pytest.raises(UnknownPathError, match="not a module of the model"):
                with tiny.trace(IDS) as tracer:
                    tracer.cache([module])

    def test_outside_a_trace(self, x):
        with NNsight(net()).trace(x) as tracer:
            pass
        with pytest.raises(NotTracingError):
            tracer.cache()


class TestSpelling:
    def test_every_way(self, tiny):
        with tiny.trace(IDS) as tracer:
            cache = tracer.cache()
        hidden = cache["model.transformer.h.0"].output
        for entry in (
            cache["transformer.h.0"],
            cache.model.transformer.h[0],
            cache.transformer.h[0],
            cache["model.transformer"].h[0],
            cache["model"]["transformer"]["h"][-3],
            cache[tiny.transformer.h[0]],
            cache.model.transformer.h[:1][0],
            next(iter(cache.model.transformer.h)),
        ):
            assert entry.output.data_ptr() == hidden.data_ptr()
        assert len(cache.model.transformer.h) == 3

    def test_blocks_as_in_a_trace(self, tiny):
        with tiny.trace(IDS) as tracer:
            cache = tracer.cache()
            during = tiny.transformer.h[0].output
        after = cache.model.transformer.h[0].output
        assert after.shape == after[0].shape == during[0].shape == (2, 4, 32)
        assert torch.equal(after[0], during[0])
        assert torch.equal(after[:, -1], during[:, -1])
        assert cache.model.output[0, -1].shape == (100,)
        assert isinstance(cache["transformer.h.0.attn"].output, tuple)

    def test_a_record_cannot_be_assigned(self, tiny):
        with tiny.trace(IDS) as tracer:
            cache = tracer.cache()
        with pytest.raises(EditError, match="inside the trace"):
            cache["transformer.h.0"].output[0] = 1

    def test_names_of_the_tree_first(self, x):
        class Odd(Module):
            def __init__(self):
                super().__init__()
                self.keys = Linear(5, 5)
                self.output = Linear(5, 5)

            def forward(self, x):
                return self.output(self.keys(x))

        with NNsight(Odd()).trace(x) as tracer:
            cache = tracer.cache()
        assert cache["model.keys"].output.shape == (3, 5)
        assert cache["model"]["output"].output.shape == (3, 5)
        assert cache.keys() == ["model", "model.keys", "model.output"]

    def test_new_names(self, tiny):
        model = LanguageModel(tiny._model, tokenizer=object(), rename={"transformer.h": "layers", "attn": "attention"})
        with model.trace(IDS) as tracer:
            cache = tracer.cache(["layers.1", model.layers[0].attention])
        assert cache.keys() == ["model.transformer.h.0.attn", "model.transformer.h.1"]
        assert cache.model.layers[1].output.shape == (2, 4, 32)
        assert cache["layers.0.attention"].output[0].shape == (2, 4, 32)

    def test_mapping(self, x):
        model = NNsight(net())
        with model.trace(x) as tracer:
            cache = tracer.cache([model[0], model[2]])
        assert "model.0" in cache
        assert "0" in cache
        assert "model.1" not in cache
        assert "nothing" not in cache
        assert len(cache) == 2
        assert [(path, entry.output.shape) for path, entry in cache.items()] == [
            ("model.0", (3, 10)),
            ("model.2", (3, 2)),
        ]
        assert [entry.output.shape for entry in cache.values()] == [(3, 10), (3, 2)]
        assert cache.save() is cache
        assert {"model"} <= set(dir(cache))
        assert {"0", "output"} <= set(dir(cache.model))

    def test_errors(self, tiny):
        with tiny.trace(IDS) as tracer:
            cache = tracer.cache(["lm_head"])
        with pytest.raises(UnknownPathError, match=r"transformer\.h\.9"):
            cache["transformer.h.9"]
        with pytest.raises(UnknownPathError, match="closest"):
            cache.model.transfomer
        with pytest.raises(NeverRanError, match="not one of the modules"):
            cache.model.transformer.h[0].output
        with pytest.raises(NeverRanError, match="include_inputs=True"):
            cache["lm_head"].inputs
        with pytest.raises(IndexError):
            cache.model.transformer.h[3]
        assert not hasattr(cache, "__array__")

    def test_printed(self, x):
        model = NNsight(net())
        with model.trace(x) as tracer:
            cache = tracer.cache([model[0], model[2]], include_inputs=True)
        assert repr(cache).splitlines() == [
            "Cache of 2 modules",
            "  model.0  inputs (([3, 5] float32,), {}), output [3, 10] float32",
            "  model.2  inputs (([3, 10] float32,), {}), output [3, 2] float32",
        ]
        assert repr(cache["model.0"]).startswith("model.0: inputs")
        assert repr(cache["model.1"]) == "model.1: nothing"
        assert repr(cache["model.0"].calls[0]).startswith("model.0, step 0: inputs")


class Twice(Module):
    def __init__(self):
        super().__init__()
        self.act = ReLU()
        self.layers = ModuleList([Linear(5, 5), Linear(5, 5)])
        self.again = self.act

    def forward(self, x):
        return self.again(self.layers[1](self.act(self.layers[0](x))))


class TestSeveralCalls:
    def test_of_a_shared_module(self, x):
        module = Twice()
        seen, _ = hooked(module, lambda: module(x))
        with NNsight(module).trace(x) as tracer:
            cache = tracer.cache(include_inputs=True)
        entry = cache["model.act"]
        assert [len(entry), len(entry.output), len(entry.inputs), len(entry.input)] == [2] * 4
        assert same(entry.output, [output for _, _, output in seen["model.act"]])
        assert same([call.output for call in entry], entry.output)
        assert same([entry[0].output, entry[-1].output], entry.output)
        assert same(cache["model.again"].output, entry.output)
        assert "2 calls, the first" in repr(entry)

    def test_of_each_step_of_a_generation(self, tiny):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        encoded = torch.tensor(IDS)
        seen, plain = hooked(
            tiny._model,
            lambda: tiny._model.generate(encoded, attention_mask=torch.ones_like(encoded), pad_token_id=0, **options),
        )
        with tiny.generate(IDS, **options) as tracer:
            cache = tracer.cache()
            result = tracer.result
        assert torch.equal(result, plain)
        assert set(cache) == set(seen)
        for path, calls in seen.items():
            assert len(cache[path].calls) == 4
            assert same([call.output for call in cache[path].calls], [output for _, _, output in calls]), path
        block = cache["model.transformer.h.0"]
        assert [call.step for call in block] == [0, 1, 2, 3]
        assert block[0].output[0].shape == (2, 4, 32)
        assert block[2].output[0].shape == (2, 1, 32)
        assert [output.shape[1] for output in block.output] == [4, 1, 1, 1]

    def test_from_a_step_on(self, tiny):
        with tiny.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
            for _ in tracer.iter[2:3]:
                cache = tracer.cache(["lm_head"])
        assert [call.step for call in cache["lm_head"]] == [2, 3]

    def test_edits_of_a_step(self, tiny):
        with tiny.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
            cache = tracer.cache(["transformer.h.1"])
            for step in tracer.iter[:]:
                tiny.transformer.h[1].output[0][:] = step
        assert [output.unique().tolist() for output in cache["transformer.h.1"].output] == [[0], [1], [2]]

    def test_children_with_numbers_go_first(self, x):
        with NNsight(Sequential(net(), ReLU())).trace(x) as tracer:
            cache = tracer.cache()
        assert cache["model.0"][2].output.shape == (3, 2)
        assert cache["model.0"].calls[0].output.shape == (3, 2)
        assert [entry.output.shape[1] for entry in cache["model.0"]] == [10, 10, 2]


class TestInvokes:
    def test_own_rows(self, tiny):
        alone = []
        for prompt in IDS:
            with tiny.trace([prompt]) as tracer:
                alone.append(tracer.cache(include_inputs=True))
        caches = {}
        for _ in range(2):
            with tiny.trace() as tracer:
                with tracer.invoke([IDS[0]]):
                    caches["first"] = tracer.cache(include_inputs=True)
                with tracer.invoke([IDS[1]]):
                    caches["second"] = tracer.cache(["lm_head", "transformer.h.0"], include_inputs=True)
                with tracer.invoke():
                    caches["all"] = tracer.cache(["lm_head"])
            for path in alone[0]:
                entry, expected = caches["first"][path], alone[0][path]
                if isinstance(entry.output, torch.Tensor):
                    assert torch.allclose(entry.output, expected.output, atol=1e-5), path
            for path in ("lm_head", "transformer.h.0"):
                assert torch.allclose(caches["second"][path].output, alone[1][path].output, atol=1e-5)
                assert torch.allclose(caches["second"][path].input, alone[1][path].input, atol=1e-5)
            assert caches["all"]["lm_head"].output.shape == (2, 4, 100)

    def test_of_the_trace_around_them(self, tiny):
        with tiny.trace() as tracer:
            cache = tracer.cache(["lm_head"])
            with tracer.invoke([IDS[0]]):
                pass
            with tracer.invoke([IDS[1]]):
                pass
        assert cache["lm_head"].output.shape == (2, 4, 100)

    def test_edits_of_others_are_not_seen(self, tiny):
        with tiny.trace([IDS[0]]):
            expected = tiny.lm_head.output
        with tiny.trace() as tracer:
            with tracer.invoke([IDS[0]]):
                kept = tracer.cache(["lm_head", "transformer.h.1"])
            with tracer.invoke([IDS[1]]):
                tiny.transformer.h[1].output[0][:] = 0
        assert torch.allclose(kept["lm_head"].output, expected, atol=1e-5)

    def test_rows_that_cannot_be_told_apart(self, x):
        class Mixes(Module):
            def forward(self, x):
                return torch.nonzero(x > 0.5)[:, 0]

        model = NNsight(Sequential(Linear(5, 5), Mixes()))
        with model.trace() as tracer:
            with tracer.invoke(x[:1]):
                cache = tracer.cache()
            with tracer.invoke(x[1:]):
                pass
        assert cache["model.0"].output.shape == (1, 5)
        with pytest.raises(RowsError, match=r"model\.1\.output"):
            cache["model.1"].output


class Residual(Module):
    """Adds to its input in place, as some models do."""

    def __init__(self):
        super().__init__()
        self.first = Linear(5, 5)
        self.second = Linear(5, 5)

    def forward(self, x):
        hidden = self.first(x)
        with torch.no_grad():
            hidden += 1
        return self.second(hidden)


class TestChangesInPlace:
    def test_are_told(self, x):
        model = NNsight(Residual())
        with pytest.warns(SavedValueChangedWarning, match=r"cached values of model\.first were.*copy=True") as caught:
            with model.trace(x) as tracer:
                tracer.cache(detach=True)
        assert [warning.filename for warning in caught] == [__file__]

    def test_copies_keep_their_numbers(self, x):
        module = Residual()
        for options in ({"copy": True}, {"dtype": torch.float64}):
            with NNsight(module).trace(x) as tracer:
                cache = tracer.cache(**options)
            assert torch.allclose(cache["model.first"].output.float(), module.first(x))

    def test_by_an_edit(self, x):
        model = NNsight(Sequential(Linear(5, 5), torch.nn.Identity()))
        with pytest.warns(SavedValueChangedWarning, match=r"model\.0"):
            with model.trace(x) as tracer:
                tracer.cache()
                model[1].output[:] = 0

    def test_in_a_scan_there_is_nothing_to_tell(self, x):
        with NNsight(Residual()).scan(x) as tracer:
            cache = tracer.cache()
        assert cache["model.first"].output.shape == (3, 5)


class TestLife:
    def test_the_model_can_go(self, tiny):
        model = LanguageModel(type(tiny._model)(tiny._model.config).eval(), tokenizer=object())
        kept = [weakref.ref(module) for module in model._model.modules()]
        with model.trace(IDS) as tracer:
            cache = tracer.cache()
        del model, tracer
        gc.collect()
        assert not [module for module in (reference() for reference in kept) if module is not None]
        assert cache.model.transformer.h[0].output[0].shape == (2, 4, 32)

    def test_it_keeps_no_graph(self, x):
        model = NNsight(net())
        with model.trace(x) as tracer:
            cache = tracer.cache()
            hidden = model[0].output
        graph = weakref.ref(hidden)
        del hidden
        gc.collect()
        assert graph() is None
        assert cache["model.0"].output.shape == (3, 10)

    def test_values_go_with_it(self, x):
        model = NNsight(net())
        with model.trace(x) as tracer:
            cache = tracer.cache()
        value = weakref.ref(cache["model.0"].output)
        del cache
        gc.collect()
        assert value() is None
