"""Values through a frame and back."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from nnsight.errors import EditError, TravelError
from nnsight.modeling._hidden import show_block_output
from nnsight.modeling._outputs import show_causal_output
from nnsight.protocol import Answer, Decoder, Encoder, read_outcome, read_tensors, write_frame


def through(value, **options):
    """`value` as the other side of a connection gets it."""
    encoder = Encoder(**options)
    node = encoder.encode(value, "value")
    frame = write_frame(Answer({"value": node}, [], [], encoder.contents, encoder.tensors.infos), encoder.tensors)
    answer, payload = read_outcome(frame)
    return Decoder(read_tensors(answer.tensors, payload), answer.containers).decode(answer.names["value"])


def alike(a, b):
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and a == b


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(allow_nan=False, allow_infinity=False),
    st.text(),
    st.binary(),
    st.sampled_from([..., NotImplemented, torch.float16, torch.bfloat16, torch.device("cpu"), torch.Size([1, 2])]),
    st.builds(slice, st.integers(), st.none(), st.integers()),
    st.builds(range, st.integers(-9, 9), st.integers(-9, 9)),
)
keys = st.one_of(st.text(), st.integers(), st.tuples(st.integers(), st.text()))
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner), st.dictionaries(keys, inner), st.frozensets(keys), st.sets(keys)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_plain_values_arrive_as_they_were(value):
    assert alike(through(value), value)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool", "complex64"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_tensors_arrive_as_they_were(dtype, shape):
    tensor = (torch.rand(shape) * 9).to(getattr(torch, dtype))
    assert alike(through(tensor), tensor)


def test_float8_arrives_bit_by_bit():
    tensor = torch.rand(5).to(torch.float8_e4m3fn)
    assert torch.equal(through(tensor).view(torch.uint8), tensor.view(torch.uint8))


def test_views_arrive_with_their_own_numbers():
    whole = torch.arange(12.0).reshape(3, 4)
    for view in (whole.T, whole[:, 1], whole[::2], whole.expand(2, 3, 4), torch.tensor(1j).conj()):
        assert torch.equal(through(view), view)


def test_a_tensor_and_a_list_that_two_names_hold_stay_one():
    tensor, items = torch.ones(2), [1]
    received = through({"a": tensor, "b": [tensor, items], "c": items})
    assert received["a"] is received["b"][0]
    assert received["b"][1] is received["c"]


def test_a_list_in_itself_arrives():
    items = [1]
    items.append(items)
    received = through(items)
    assert received[1] is received


def test_ordered_dictionaries_and_parameters_keep_their_class():
    received = through(OrderedDict(b=torch.nn.Parameter(torch.ones(2)), a=1))
    assert type(received) is OrderedDict
    assert list(received) == ["b", "a"]
    assert isinstance(received["b"], torch.nn.Parameter)
    assert received["b"].requires_grad


def test_results_are_data_with_their_gradient():
    leaf = torch.ones(2, requires_grad=True)
    hidden = leaf * 2
    hidden.retain_grad()
    hidden.sum().backward()
    received = through(hidden, data_only=True)
    assert not received.requires_grad
    assert torch.equal(received.grad, torch.ones(2))


def test_what_torch_returns_keeps_its_names():
    received = through(torch.tensor([1.0, 3.0, 2.0]).topk(2))
    assert received.values.tolist() == [3, 2]
    assert received.indices.tolist() == [1, 2]


def test_block_outputs_keep_both_spellings():
    hidden, extra = torch.rand(1, 2, 3), torch.rand(4)
    bare = through(show_block_output(hidden, lambda _: None))
    assert torch.equal(bare[0], hidden)
    assert torch.equal(bare[:, -1], hidden[:, -1])
    native = through(show_block_output((hidden, extra), lambda _: None))
    assert torch.equal(native[0], hidden)
    assert torch.equal(native[1], extra)
    with pytest.raises(EditError, match="The trace is over"):
        bare[0] = hidden


def test_model_outputs_arrive_with_their_cache():
    cache = DynamicCache()
    cache.update(torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4), 0)
    output = show_causal_output(CausalLMOutputWithPast(logits=torch.rand(1, 3, 5), past_key_values=cache))
    received = through(output)
    assert torch.equal(received.logits, output.logits)
    assert torch.equal(received[0, -1], output.logits[0, -1])
    assert torch.equal(received.past_key_values.layers[0].keys, cache.layers[0].keys)
    assert received.past_key_values.get_seq_length() == 3


def test_a_field_that_cannot_travel_says_so_when_it_is_used():
    received = through(CausalLMOutputWithPast(logits=torch.rand(1, 3, 5), past_key_values=object()))
    assert received.logits.shape == (1, 3, 5)
    with pytest.raises(AttributeError, match=r"`value.past_key_values` cannot travel: it is a object"):
        received.past_key_values.get_seq_length()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, open]}, r"`value\['a'\]\[1\]` cannot travel: it is a builtin_function_or_method"),
        (
            torch.ones(2).to_sparse(),
            "`value` cannot travel: it is a tensor of dtype torch.float32 and layout torch.sparse_coo",
        ),
        (torch.ones(2, device="meta"), "on the meta device"),
    ],
)
def test_what_cannot_travel_is_named(value, message):
    with pytest.raises(TravelError, match=message):
        through(value)


def test_deep_nesting_is_refused():
    value = []
    for _ in range(1000):
        value = [value]
    with pytest.raises(TravelError, match="nested"):
        through(value)
