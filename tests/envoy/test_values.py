"""Values of every shape: tuples, named tuples, mappings, keyword inputs; reading them and writing them."""

import copy
import pickle
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch.nn import Linear, Module, ReLU, Sequential

from nnsight import NNsight
from nnsight.errors import EditError, InputError, NeverRanError, NotTracingError


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


Old = namedtuple("Old", "left right")


class Gives(Module):
    """Returns what `make` makes of its input."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


class Takes(Module):
    """Remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.got = None

    def forward(self, value):
        self.got = value
        return value


def chain(make):
    net = Sequential(Gives(make), Takes())
    return net, NNsight(net)


@pytest.fixture
def x():
    return torch.arange(6.0).reshape(2, 3)


class TestTuples:
    def test_read(self, x):
        net, model = chain(lambda x: (x, x + 1, "text"))
        with model.trace(x):
            found = model[0].output
            assert isinstance(found, tuple)
            assert len(found) == 3
            first, second, third = found
            assert found[-1] == "text"
            assert torch.equal(found[1], x + 1)
            assert found[1:] == (second, third)
            assert isinstance(found[:1], tuple)
            assert [type(item) for item in found] == [torch.Tensor, torch.Tensor, str]
        assert first is x
        assert torch.equal(second, x + 1)
        assert type(net[1].got) is tuple

    def test_item_assignment(self, x):
        net, model = chain(lambda x: (x, x + 1))
        with model.trace(x):
            model[0].output[0] = x * 5
            assert torch.equal(model[0].output[0], x * 5)
        assert type(net[1].got) is tuple
        assert torch.equal(net[1].got[0], x * 5)
        assert torch.equal(net[1].got[1], x + 1)

    def test_several_item_assignments_to_one_value(self, x):
        net, model = chain(lambda x: (x, x + 1, x + 2))
        with model.trace(x):
            found = model[0].output
            found[0] = x * 5
            found[-1] = x * 6
            assert torch.equal(found[0], x * 5)
            assert torch.equal(found[2], x * 6)
        assert [torch.equal(a, b) for a, b in zip(net[1].got, (x * 5, x + 1, x * 6), strict=True)] == [True] * 3

    def test_edit_of_an_item_in_place(self, x):
        net, model = chain(lambda x: (x.clone(), x + 1))
        with model.trace(x):
            model[0].output[1][:, 0] = -1
        assert torch.equal(net[1].got[1][:, 0], torch.full((2,), -1.0))
        assert torch.equal(net[1].got[0], x)

    def test_whole_assignment(self, x):
        net, model = chain(lambda x: (x, x + 1))
        with model.trace(x):
            model[0].output = (x * 2, None)
        assert type(net[1].got) is tuple
        assert torch.equal(net[1].got[0], x * 2)
        assert net[1].got[1] is None

    def test_assignment_of_what_was_read(self, x):
        net, model = chain(lambda x: (x, (x + 1, x + 2)))
        with model.trace(x):
            found = model[0].output
            model[0].output = (found[0], found[1])
        assert type(net[1].got) is tuple
        assert type(net[1].got[1]) is tuple

    def test_nested(self, x):
        net, model = chain(lambda x: (x, (x + 1, [x + 2])))
        with model.trace(x):
            model[0].output[1][0] = x * 7
            model[0].output[1][1][0] = x * 8
        assert type(net[1].got) is tuple
        assert type(net[1].got[1]) is tuple
        assert torch.equal(net[1].got[0], x)
        assert torch.equal(net[1].got[1][0], x * 7)
        assert torch.equal(net[1].got[1][1][0], x * 8)

    def test_functions_of_c_see_assigned_items(self, x):
        _, model = chain(lambda x: (x, x + 1))
        with model.trace(x):
            found = model[0].output
            found[0] = x * 5
            joined = torch.cat(found)
            longer = found.__add__((1,))
            named = dict(zip("ab", found, strict=True))
        assert torch.equal(joined, torch.cat((x * 5, x + 1)))
        assert torch.equal(longer[0], x * 5)
        assert torch.equal(named["a"], x * 5)

    def test_saved_tuple_survives(self, x):
        _, model = chain(lambda x: (x, x + 1))
        with model.trace(x):
            found = model[0].output.save()
        assert torch.equal(found[1], x + 1)
        assert repr(found) == repr((x, x + 1))
        assert hash(found) == hash(tuple(found))

    def test_copies_are_plain(self, x):
        _, model = chain(lambda x: (x, x + 1))
        with model.trace(x):
            found = model[0].output.save()
        for again in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
            assert type(again) is tuple
            assert torch.equal(again[1], x + 1)

    def test_empty(self, x):
        net, model = chain(lambda x: ())
        with model.trace(x):
            found = model[0].output
        assert found == ()
        assert net[1].got == ()


@pytest.mark.parametrize("kind", [Pair, Old])
class TestNamedTuples:
    def test_read(self, kind, x):
        net, model = chain(lambda x: kind(x, x + 1))
        with model.trace(x):
            found = model[0].output
            assert isinstance(found, kind)
            assert torch.equal(found.right, x + 1)
            assert torch.equal(found[1], x + 1)
        assert type(net[1].got) is kind

    def test_item_assignment(self, kind, x):
        net, model = chain(lambda x: kind(x, x + 1))
        with model.trace(x):
            found = model[0].output
            found[1] = x * 5
            assert torch.equal(found.right, x * 5)
            assert torch.equal(model[0].output.right, x * 5)
        assert type(net[1].got) is kind
        assert torch.equal(net[1].got.right, x * 5)
        assert torch.equal(net[1].got.left, x)

    def test_whole_assignment(self, kind, x):
        net, model = chain(lambda x: kind(x, x + 1))
        with model.trace(x):
            model[0].output = model[0].output._replace(left=x * 3)
        assert type(net[1].got) is kind
        assert torch.equal(net[1].got.left, x * 3)
        assert torch.equal(net[1].got.right, x + 1)


class TestMappings:
    @pytest.mark.parametrize("kind", [dict, OrderedDict])
    def test_read_and_edit(self, kind, x):
        net, model = chain(lambda x: kind(a=x.clone(), b=x + 1))
        with model.trace(x):
            found = model[0].output
            assert type(found) is kind
            found["a"][:] = 0
            found["b"] = x * 2
        assert torch.equal(net[1].got["a"], torch.zeros(2, 3))
        assert torch.equal(net[1].got["b"], x * 2)

    def test_whole_assignment(self, x):
        net, model = chain(lambda x: {"a": x})
        with model.trace(x):
            model[0].output = {**model[0].output, "b": x}
        assert net[1].got.keys() == {"a", "b"}

    def test_edited_mapping_in_a_second_pass(self, x):
        _, model = chain(lambda x: {"a": x + 0})
        with pytest.warns(UserWarning, match="second forward"):
            with model.trace(x):
                model[0].output["a"] = x * 4
                model.output
                late = model[1].input
        assert torch.equal(late["a"], x * 4)

    def test_list(self, x):
        net, model = chain(lambda x: [x, x + 1])
        with model.trace(x):
            model[0].output[0] = x * 4
            model[0].output.append(x)
        assert len(net[1].got) == 3
        assert torch.equal(net[1].got[0], x * 4)

    def test_model_output_of_transformers(self, x):
        from transformers.modeling_outputs import BaseModelOutput

        net, model = chain(lambda x: BaseModelOutput(last_hidden_state=x.clone(), hidden_states=(x, x + 1)))
        with model.trace(x):
            found = model[0].output
            assert torch.equal(found.last_hidden_state, x)
            assert torch.equal(found[0], x)
            found.last_hidden_state[:] = 3
        assert type(net[1].got) is BaseModelOutput
        assert torch.equal(net[1].got.last_hidden_state, torch.full((2, 3), 3.0))

    def test_dataclass_and_other_objects(self, x):
        @dataclass
        class Held:
            value: torch.Tensor

        net, model = chain(lambda x: Held(x.clone()))
        with model.trace(x):
            model[0].output.value[:] = 1
            model[0].output.value = model[0].output.value * 3
        assert torch.equal(net[1].got.value, torch.full((2, 3), 3.0))

    @pytest.mark.parametrize("value", [None, 3, "text", 2.5, True])
    def test_plain_values(self, x, value):
        net, model = chain(lambda x: value)
        with model.trace(x):
            assert model[0].output is value
            model[0].output = 7
        assert net[1].got == 7


class Keywords(Module):
    def forward(self, hidden, mask=None, *, scale=1.0):
        self.got = {"hidden": hidden, "mask": mask, "scale": scale}
        return hidden * scale


class Calls(Module):
    def __init__(self):
        super().__init__()
        self.by_keyword = Keywords()
        self.mixed = Keywords()
        self.none = Nothing()

    def forward(self, x):
        x = self.by_keyword(hidden=x, scale=2.0)
        x = self.mixed(x, mask=torch.ones(2, 3))
        return x + self.none()


class Nothing(Module):
    def forward(self):
        return 1


@pytest.fixture
def calls():
    net = Calls()
    return net, NNsight(net)


class TestInputs:
    def test_read(self, calls, x):
        _, model = calls
        with model.trace(x):
            whole = model.inputs
            first = model.by_keyword.input
            args, kwargs = model.by_keyword.inputs
            mixed_args, mixed_kwargs = model.mixed.inputs
            mixed = model.mixed.input
        assert whole[0][0] is x
        assert whole[1] == {}
        assert first is x
        assert args == ()
        assert list(kwargs) == ["hidden", "scale"]
        assert kwargs["hidden"] is x
        assert len(mixed_args) == 1
        assert torch.equal(mixed_args[0], x * 2)
        assert list(mixed_kwargs) == ["mask"]
        assert torch.equal(mixed, x * 2)

    def test_no_argument_at_all(self, calls, x):
        _, model = calls
        with pytest.raises(EditError, match=r"model\.none was called without any argument"):
            with model.trace(x):
                model.none.input
        with model.trace(x):
            nothing = model.none.inputs
        assert nothing == ((), {})

    def test_assign_first_positional(self, calls, x):
        net, model = calls
        with model.trace(x):
            model.mixed.input = x * 9
            out = model.output
        assert torch.equal(net.mixed.got["hidden"], x * 9)
        assert torch.equal(net.mixed.got["mask"], torch.ones(2, 3))
        assert torch.equal(out, x * 9 + 1)

    def test_assign_first_keyword(self, calls, x):
        net, model = calls
        with model.trace(x):
            model.by_keyword.input = x * 9
        assert torch.equal(net.by_keyword.got["hidden"], x * 9)
        assert net.by_keyword.got["scale"] == 2.0

    def test_assign_inputs(self, calls, x):
        net, model = calls
        with model.trace(x):
            args, kwargs = model.by_keyword.inputs
            model.by_keyword.inputs = (args, {**kwargs, "scale": 5.0})
            model.mixed.inputs = ((x, None), {"scale": 3.0})
            out = model.output
        assert net.by_keyword.got["scale"] == 5.0
        assert net.mixed.got["mask"] is None
        assert torch.equal(out, x * 3 + 1)

    def test_assign_inputs_as_lists(self, calls, x):
        net, model = calls
        with model.trace(x):
            model.mixed.inputs = ([x], {})
        assert net.mixed.got["hidden"] is x

    def test_edit_in_place(self, x):
        net = Sequential(Linear(3, 3), ReLU())
        model = NNsight(net)
        with torch.no_grad(), model.trace(x):
            model[1].input[:, 0] = -5
            model[1].input[:, 1] = 5
            out = model.output
        assert torch.equal(out[:, 0], torch.zeros(2))
        assert torch.equal(out[:, 1], torch.full((2,), 5.0))

    def test_input_then_output_of_one_module(self, x):
        net = Sequential(Linear(3, 3), ReLU())
        model = NNsight(net)
        with model.trace(x):
            model[1].input = model[1].input + 100
            out = model[1].output
        assert torch.equal(out, net[0](x) + 100)

    def test_input_of_the_root(self, x):
        net = Sequential(Linear(3, 3), ReLU())
        model = NNsight(net)
        with model.trace(x):
            model.input = x * 2
            assert torch.equal(model.input, x * 2)
            out = model.output
        assert torch.equal(out, net(x * 2))

    def test_keyword_inputs_of_the_trace(self):
        net = Keywords()
        model = NNsight(net)
        x = torch.ones(2, 3)
        with model.trace(hidden=x, scale=4.0):
            given = model.input
            out = model.output
        assert given is x
        assert torch.equal(out, x * 4)


class TestWrites:
    def test_output_of_the_root_is_the_result(self, x):
        model = NNsight(Sequential(ReLU()))
        with model.trace(x) as tracer:
            model.output = x * 3
            result = tracer.result
        assert torch.equal(result, x * 3)

    def test_augmented_assignment(self, x):
        net = Sequential(Linear(3, 3), ReLU())
        model = NNsight(net)
        with torch.no_grad():
            with model.trace(x):
                model[0].output += 1
                out = model.output
            with model.trace(x):
                model[0].output *= 2
                doubled = model.output
        assert torch.equal(out, torch.relu(net[0](x) + 1))
        assert torch.equal(doubled, torch.relu(net[0](x) * 2))

    def test_later_writes_win(self, x):
        model = NNsight(Sequential(ReLU(), ReLU()))
        with model.trace(x):
            model[0].output = x * 3
            model[0].output = x * 4
            out = model.output
        assert torch.equal(out, x * 4)

    def test_gradients_through_an_edit(self, x):
        net = Sequential(Linear(3, 3), ReLU(), Linear(3, 1))
        model = NNsight(net)
        steering = torch.zeros(3, requires_grad=True)
        with model.trace(x):
            model[0].output = model[0].output + steering
            loss = model.output.sum()
        loss.backward()
        hidden = net[0](x).detach().requires_grad_()
        net[2](torch.relu(hidden)).sum().backward()
        assert torch.allclose(steering.grad, hidden.grad.sum(0))

    def test_no_edits_is_bit_identical(self, x):
        torch.manual_seed(0)
        net = Sequential(Linear(3, 64), ReLU(), Linear(64, 3))
        model = NNsight(net)
        expected = net(x)
        for _ in range(3):
            with model.trace(x):
                out = model.output
            assert torch.equal(out, expected)


class TestTuplesMadeInC:
    def test_fields_and_items(self, x):
        net, model = chain(lambda x: x.max(dim=1))
        kind = type(x.max(dim=1))
        with model.trace(x):
            found = model[0].output
            found[0] = found.values * 2
            assert torch.equal(found.values, x.amax(1) * 2)
            assert torch.equal(found.indices, x.argmax(1))
        assert type(net[1].got) is kind
        assert torch.equal(net[1].got.values, x.amax(1) * 2)

    def test_size(self, x):
        net, model = chain(lambda x: x.shape)
        with model.trace(x):
            assert model[0].output == (2, 3)
            model[0].output[1] = 5
        assert net[1].got == torch.Size([2, 5])
        assert type(net[1].got) is torch.Size

    def test_assignment_keeps_the_length(self, x):
        _, model = chain(lambda x: (x, x))
        with pytest.raises(EditError, match="2 items"):
            with model.trace(x):
                model[0].output[:1] = (x, x)


class TestNext:
    """A module called several times: `next()` goes on to its later calls."""

    @pytest.fixture
    def net(self):
        torch.manual_seed(0)
        relu = ReLU()
        return Sequential(Linear(3, 3), relu, Linear(3, 3), relu, Linear(3, 3), relu)

    def test_reads(self, net, x):
        model = NNsight(net)
        for _ in range(2):
            with model.trace(x):
                first = model[1].output
                again = model[1].output
                second = model[1].next().output
                given = model[4].input
                third = model[1].next().output
            assert first is again
            assert torch.equal(first, net[:2](x))
            assert torch.equal(second, net[:4](x))
            assert given is second
            assert torch.equal(third, net(x))

    def test_several_at_once(self, net, x):
        model = NNsight(net)
        for _ in range(2):
            with model.trace(x):
                third = model[1].next(2).output
            assert torch.equal(third, net(x))

    def test_edit(self, net, x):
        model = NNsight(net)
        for _ in range(2):
            with model.trace(x):
                model[1].next().output = torch.ones(2, 3)
                out = model.output
            assert torch.equal(out, net[5](net[4](torch.ones(2, 3))))

    def test_input(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            given = model[1].next().input
        assert torch.equal(given, net[:3](x))

    def test_more_calls_than_there_are(self, net, x):
        model = NNsight(net)
        for _ in range(2):
            with pytest.raises(NeverRanError, match=r"model\.1\.output.* 4 times"):
                with model.trace(x):
                    model[1].next(3).output

    def test_backwards(self, net, x):
        model = NNsight(net)
        with pytest.raises(InputError, match="forwards"):
            with model.trace(x):
                model[1].next(-1)

    def test_outside_a_trace(self, net):
        with pytest.raises(NotTracingError):
            NNsight(net)[1].next()

    def test_the_next_trace_starts_anew(self, net, x):
        model = NNsight(net)
        for _ in range(2):
            with model.trace(x):
                model[1].next(2)
            with model.trace(x):
                first = model[1].output
            assert torch.equal(first, net[:2](x))
