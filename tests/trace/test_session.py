"""A session groups traces; their values are ordinary variables."""

import pytest
import torch
from torch.nn import Linear, Sequential

from nnsight import LanguageModel, NNsight
from nnsight.errors import NotTracingError


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Sequential(Linear(3, 4), Linear(4, 2))


def test_values_cross_traces(net):
    model, x = NNsight(net), torch.ones(1, 3)
    with model.session() as session:
        with model.trace(x):
            hidden = model[0].output.save()
        doubled = hidden * 2
        with model.trace(torch.zeros(1, 3)):
            model[0].output = doubled
            output = model.output.save()
    assert session is not None
    assert torch.equal(output, net[1](net[0](x) * 2))


def test_as_in_the_documents(tiny):
    with tiny.session():
        with tiny.trace([1, 2, 3]):
            first = tiny.transformer.h[0].output[0].save()
        with tiny.trace([4, 5, 6]):
            tiny.transformer.h[0].output[0][:] = first
            second = tiny.transformer.h[0].output[0].save()
            logits = tiny.lm_head.output.save()
    with tiny.trace([1, 2, 3]):
        expected = tiny.lm_head.output
    assert torch.equal(first, second)
    assert torch.equal(logits, expected)


def test_loops_and_every_kind_of_trace(tiny):
    with tiny.session():
        means = []
        for prompt in ([1, 2], [3, 4]):
            with tiny.trace(prompt):
                means.append(tiny.lm_head.output.mean().item())
        with tiny.scan([1, 2]):
            shape = tiny.lm_head.output.shape
        with tiny.trace([1, 2]) as tracer:
            cache = tracer.cache(["lm_head"])
        with tiny.generate([1, 2], max_new_tokens=2, min_new_tokens=2) as tracer:
            tokens = tracer.result
    assert means[0] == cache["lm_head"].output.mean().item()
    assert shape == (1, 2, 100)
    assert tokens.shape == (1, 4)


def test_an_unloaded_model(folder, tiny, monkeypatch):
    model = LanguageModel(folder, tokenizer=object())
    monkeypatch.setattr(model._source, "load", lambda: tiny._model)
    with model.session():
        with model.scan([1, 2]):
            shape = model.lm_head.output.shape
        assert not model.dispatched
        with model.trace([1, 2]):
            logits = model.lm_head.output
    assert shape == logits.shape


@pytest.mark.parametrize("inside", [True, False])
def test_an_error_ends_it(net, inside):
    model, x, after = NNsight(net), torch.ones(1, 3), []
    with pytest.raises(ValueError, match="mine") as caught:
        with model.session():
            with model.trace(x):
                model[0].output
                if inside:
                    raise ValueError("mine")
            raise ValueError("mine")
        after.append(1)
    assert not after
    assert [entry.path.name for entry in caught.traceback] == ["test_session.py"]
    assert all("forward" not in vars(module) for module in net.modules())
    with model.session(), model.trace(x):
        output = model.output
    assert torch.equal(output, net(x))


def test_entered_once(net):
    session = NNsight(net).session()
    with session:
        pass
    with pytest.raises(NotTracingError, match=r"model\.session\(\) again"):
        with session:
            pass
