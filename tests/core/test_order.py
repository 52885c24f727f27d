"""Reads in any order, writes in order; what a second pass gives is what the first one had, or an error."""

import re
import sys
import warnings

import pytest
import torch
from torch.nn import BatchNorm1d, Dropout, InstanceNorm1d, Linear, Module, ModuleList, ReLU, Sequential

from nnsight import CONFIG, NNsight
from nnsight.errors import NeverRanError, NotTracingError, OutOfOrderError, OutOfOrderWarning


class Counter(Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


class Net(Module):
    def __init__(self, layers=12):
        super().__init__()
        self.counter = Counter()
        self.layers = ModuleList([Sequential(Linear(4, 4), ReLU()) for _ in range(layers)])
        self.unused = Linear(4, 4)
        self.unused_group = Sequential(Linear(4, 4), ReLU())
        self.head = Linear(4, 2)

    def forward(self, x):
        x = self.counter(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 4)


def outputs(net, *args, **kwargs):
    """What every call of every module returned, by plain hooks."""
    found, handles = {}, []
    for name, module in net.named_modules():

        def look(module, args, output, name=name):
            found.setdefault(name, []).append(output.detach().clone())

        handles.append(module.register_forward_hook(look))
    net(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


def one_warning(caught):
    assert [type(w.message) for w in caught] == [OutOfOrderWarning]
    return caught[0]


class TestReads:
    @pytest.mark.parametrize("warm", [False, True])
    def test_in_reverse(self, net, x, warm):
        expected = outputs(net, x)
        model = NNsight(net)
        if warm:
            with model.trace(x):
                model.output
        with pytest.warns(OutOfOrderWarning) as caught:
            with model.trace(x):
                out = model.output
                last = model.head.output
                found = [model.layers[i].output for i in reversed(range(12))]
                found += [model.layers[i][0].output for i in reversed(range(12))]
        one_warning(caught)
        assert torch.equal(out, expected[""][0])
        assert torch.equal(last, expected["head"][0])
        names = [f"layers.{i}" for i in reversed(range(12))] + [f"layers.{i}.0" for i in reversed(range(12))]
        assert all(torch.equal(a, expected[name][0]) for a, name in zip(found, names, strict=True))

    def test_inputs_and_outputs_of_one_module(self, net, x):
        expected = outputs(net, x)
        model = NNsight(net)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with model.trace(x):
                after = model.layers[3].output
                before = model.layers[3].input
                again = model.layers[3].output
        assert torch.equal(before, expected["layers.2"][0])
        assert again is after

    @pytest.mark.parametrize("warm", [False, True])
    def test_twelve_early_reads_cost_one_forward(self, net, x, warm):
        expected = outputs(net, x)
        model = NNsight(net)
        if warm:
            with model.trace(x):
                model.output
        net.counter.calls = 0
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model.head.output
                found = [model.layers[i].output for i in range(12)]
        assert net.counter.calls == 2
        assert all(torch.equal(f, expected[f"layers.{i}"][0]) for i, f in enumerate(found))

    def test_the_second_pass_runs_no_further_than_needed(self, x):
        net = Sequential(Counter(), Linear(4, 4), Counter(), Linear(4, 4), Counter())
        model = NNsight(net)
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model[3].output
                model[1].output
        assert [net[i].calls for i in (0, 2, 4)] == [2, 1, 1]

    def test_in_order_reads_cost_nothing(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            for layer in model.layers:
                layer[0].input, layer[0].output, layer[1].output, layer.output
            model.head.output, model.output
        assert net.counter.calls == 1

    def test_two_early_reads_then_the_rest_of_the_forward(self, net, x):
        expected = outputs(net, x)
        model = NNsight(net)
        with pytest.warns(OutOfOrderWarning) as caught:
            with model.trace(x):
                found = {i: model.layers[i].output for i in (5, 2, 7, 3, 9)}
                out = model.output
        one_warning(caught)
        assert all(torch.equal(found[i], expected[f"layers.{i}"][0]) for i in found)
        assert torch.equal(out, expected[""][0])

    def test_the_warning_names_the_line(self, net, x):
        model = NNsight(net)
        with pytest.warns(OutOfOrderWarning) as caught:
            with model.trace(x):
                model.head.output
                line = sys._getframe().f_lineno + 1
                model.layers[4].output
                model.layers[3].output
        found = one_warning(caught)
        assert (found.filename, found.lineno) == (__file__, line)
        assert "model.layers.4.output" in str(found.message)
        assert f"line {line} of test_order.py" in str(found.message)

    def test_one_warning_a_trace(self, net, x):
        model = NNsight(net)
        for _ in range(2):
            with pytest.warns(OutOfOrderWarning) as caught:
                with model.trace(x):
                    model.head.output
                    model.layers[4].output
            one_warning(caught)

    def test_early_inputs(self, net, x):
        expected = outputs(net, x)
        model = NNsight(net)
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model.output
                given = model.layers[4].input
                args, kwargs = model.layers[7].inputs
                first = model.input
        assert torch.equal(given, expected["layers.3"][0])
        assert torch.equal(args[0], expected["layers.6"][0])
        assert kwargs == {}
        assert torch.equal(first, x)


class TestWrites:
    @pytest.mark.parametrize("warm", [False, True])
    @pytest.mark.parametrize("deep", [False, True])
    def test_too_late(self, net, x, warm, deep):
        model = NNsight(net)
        if warm:
            with model.trace(x):
                model.output
        with pytest.raises(OutOfOrderError, match=r"model\.layers\.2(\.0)?\.output") as caught:
            with model.trace(x):
                model.layers[5].output
                early = model.layers[2][0] if deep else model.layers[2]
                line = sys._getframe().f_lineno + 1
                early.output = torch.zeros(3, 4)
        assert f"line {line} of test_order.py" in str(caught.value)

    def test_input_too_late(self, net, x):
        model = NNsight(net)
        for name in ("input", "inputs"):
            with pytest.raises(OutOfOrderError):
                with model.trace(x):
                    model.layers[5].output
                    setattr(model.layers[5], name, x if name == "input" else ((x,), {}))

    def test_after_the_end(self, net, x):
        model = NNsight(net)
        with pytest.raises(OutOfOrderError, match=r"tracer\.result"):
            with model.trace(x) as tracer:
                tracer.result
                model.layers[5].output = x

    def test_in_order(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            model.layers[2].input = x
            model.layers[2][0].output = x * 2
            model.layers[2].output = x * 3
            out = model.output
        rest = x * 3
        for layer in net.layers[3:]:
            rest = layer(rest)
        assert torch.equal(out, net.head(rest))

    def test_traceback_ends_at_the_users_line(self, net, x):
        model = NNsight(net)
        with pytest.raises(OutOfOrderError) as caught:
            with model.trace(x):
                model.layers[5].output
                model.layers[2].output = x
        frames = caught.traceback
        assert {str(entry.path) for entry in frames} == {__file__}

    def test_held_tuple_cannot_be_assigned_later(self, x):
        class Pair(Module):
            def forward(self, x):
                return x, x + 1

        class Two(Module):
            def __init__(self):
                super().__init__()
                self.pair = Pair()
                self.lin = Linear(4, 4)

            def forward(self, x):
                return self.lin(self.pair(x)[0])

        model = NNsight(Two())
        with pytest.raises(OutOfOrderError, match=re.escape("model.pair.output")):
            with model.trace(x):
                pair = model.pair.output
                model.lin.output
                pair[0] = x


class TestStrictOrder:
    def test_argument(self, net, x):
        model = NNsight(net)
        with pytest.raises(OutOfOrderError, match="Strict order"):
            with model.trace(x, strict_order=True):
                model.layers[5].output
                model.layers[2].output
        assert net.counter.calls == 1

    def test_config(self, net, x, monkeypatch):
        monkeypatch.setattr(CONFIG.APP, "STRICT_ORDER", True)
        model = NNsight(net)
        with pytest.raises(OutOfOrderError, match="Strict order"):
            with model.trace(x):
                model.layers[5].output
                model.layers[2].output

    def test_is_off_by_default(self):
        assert CONFIG.APP.STRICT_ORDER is False

    def test_reads_in_order_are_fine(self, net, x):
        expected = outputs(net, x)
        model = NNsight(net)
        with model.trace(x, strict_order=True):
            found = [layer.output for layer in model.layers]
        assert all(torch.equal(f, expected[f"layers.{i}"][0]) for i, f in enumerate(found))


@pytest.mark.filterwarnings("ignore::nnsight.errors.OutOfOrderWarning")
class TestWhatCannotBeRepeated:
    def refused(self, body, net, x, match):
        model = NNsight(net)
        with pytest.raises(OutOfOrderError, match=match):
            with model.trace(x):
                body(model)
        with model.trace(x):  # the next trace is none the worse
            model.output

    def test_input_changed_in_place(self, net, x):
        def body(model):
            model.layers[5].output
            x.add_(1)
            model.layers[2].output

        self.refused(body, net, x, "input tensor was changed in place")

    def test_input_changed_in_place_by_the_model(self, x):
        class Greedy(Module):
            def forward(self, x):
                return x.mul_(2)

        def body(model):
            model[1].output
            model[0].input

        self.refused(body, Sequential(Greedy(), Linear(4, 4)), x, "changed in place")

    def test_edited_value_changed_since(self, net, x):
        value = torch.ones(3, 4)

        def body(model):
            model.layers[1].output = value
            model.layers[5].output
            value.zero_()
            model.layers[2].output

        self.refused(body, net, x, "an edited value was changed in place")

    def test_read_value_changed_since(self, net, x):
        def body(model):
            with torch.no_grad():
                hidden = model.layers[1].output
                model.layers[5].output
                hidden.zero_()
                model.layers[2].output

        self.refused(body, net, x, re.escape("model.layers.1") + ".*changed in place")

    def test_parameter_changed_since(self, net, x):
        def body(model):
            model.layers[5].output
            with torch.no_grad():
                net.layers[1][0].weight.zero_()
            model.layers[2].output

        self.refused(body, net, x, "changed")

    @pytest.mark.parametrize("reads", [1, 2])
    def test_batch_norm_in_training(self, x, reads):
        torch.manual_seed(0)
        net = Sequential(Linear(4, 4), BatchNorm1d(4), ReLU(), Linear(4, 4))
        model = NNsight(net)
        net(x)
        once = {name: buffer.clone() for name, buffer in net.named_buffers()}
        net(x)
        twice = {name: buffer.clone() for name, buffer in net.named_buffers()}
        for name, buffer in net.named_buffers():
            buffer.copy_(once[name])
        with pytest.raises(OutOfOrderError, match="batch norm"):
            with model.trace(x):
                model[3].output
                if reads == 2:
                    model[0].output  # before the batch norm: can be served
                model[2].output
        for name, buffer in net.named_buffers():
            assert torch.equal(buffer, twice[name]), name

    def test_parameter_changed_before(self, net, x):
        model = NNsight(net)
        for exchange in (False, True):
            with torch.no_grad():
                if exchange:
                    net.layers[1][0].weight = torch.nn.Parameter(torch.ones(4, 4))
                else:
                    net.layers[1][0].weight.zero_()
            with pytest.warns(OutOfOrderWarning):
                with model.trace(x):
                    model.layers[5].output
                    late = model.layers[2].output
            assert torch.equal(late, outputs(net, x)["layers.2"][0])

    def test_buffer_with_nan(self, x):
        net = Sequential(Linear(4, 4), ReLU())
        net.register_buffer("unset", torch.full((2,), torch.nan))
        model = NNsight(net)
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model[1].output
                late = model[0].output
        assert torch.equal(late, net[0](x))

    def test_batch_norm_in_evaluation(self, x):
        net = Sequential(Linear(4, 4), BatchNorm1d(4), ReLU(), Linear(4, 4)).eval()
        expected = outputs(net, x)
        model = NNsight(net)
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model[3].output
                found = model[2].output
        assert torch.equal(found, expected["2"][0])

    def test_instance_norm_in_training(self, x):
        net = Sequential(Linear(4, 4), InstanceNorm1d(3, track_running_stats=True), ReLU())
        x = x[None]
        net(x)
        once = {name: buffer.clone() for name, buffer in net.named_buffers()}
        net(x)
        twice = {name: buffer.clone() for name, buffer in net.named_buffers()}
        for name, buffer in net.named_buffers():
            buffer.copy_(once[name])
        model = NNsight(net)
        with pytest.raises(OutOfOrderError, match="buffers"):
            with model.trace(x):
                model[2].output
                model[1].output
        for name, buffer in net.named_buffers():
            assert torch.equal(buffer, twice[name]), name

    def test_buffer_that_is_exchanged(self, x):
        class Average(Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("mean", torch.zeros(4))

            def forward(self, x):
                self.mean = self.mean * 0.5 + x.mean(0) * 0.5
                return x - self.mean

        net = Sequential(Average(), Linear(4, 4), ReLU())
        once = x.mean(0) * 0.5
        model = NNsight(net)
        with pytest.raises(OutOfOrderError):
            with model.trace(x):
                model[2].output
                model[0].output
        assert torch.equal(net[0].mean, once)

    def test_late_value_changed_in_place(self, net, x):
        model = NNsight(net)
        for then in ("nothing", "read", "end"):
            with pytest.raises(OutOfOrderError, match=r"model\.layers\.2\.output had already passed"):
                with torch.no_grad(), model.trace(x):
                    model.layers[5].output
                    late = model.layers[2].output
                    late[:] = 0
                    if then == "read":
                        model.layers[7].output
                    elif then == "end":
                        model.output

    def test_late_value_changed_in_place_and_dropped(self, net, x):
        model = NNsight(net)
        with pytest.raises(OutOfOrderError, match=r"model\.layers\.2\.output had already passed"):
            with torch.no_grad(), model.trace(x):
                model.layers[5].output
                model.layers[2].output[:] = 0

    def test_late_value_worked_on_as_a_copy(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            model.layers[5].output
            changed = model.layers[2].output.clone()
            changed[:] = 0
        assert not changed.any()

    def test_under_inference_mode(self, net, x):
        model = NNsight(net)
        with torch.inference_mode():
            inference = x + 0
            with pytest.raises(OutOfOrderError, match="inference mode"):
                with model.trace(inference):
                    model.layers[5].output
                    model.layers[2].output


class TestReplay:
    """The second pass has the edits, and the random numbers, of the first."""

    def test_assigned_output(self, net, x):
        value = torch.randn(3, 4)
        expected = value
        for layer in net.layers[3:8]:
            expected = layer(expected)
        model = NNsight(net)
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model.layers[2].output = value
                model.output
                late = model.layers[7].output
                edited = model.layers[2].output
                before = model.layers[1].output
        assert torch.equal(late, expected)
        assert torch.equal(edited, value)
        assert torch.equal(before, outputs(net, x)["layers.1"][0])

    def test_edit_in_place(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            model.layers[2].output[:, 1] = 5
            expected = model.layers[7].output.clone()
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model.layers[2].output[:, 1] = 5
                model.output
                late = model.layers[7].output
        assert torch.equal(late, expected)
        assert not torch.equal(late, outputs(net, x)["layers.7"][0])

    def test_assigned_input(self, net, x):
        model = NNsight(net)
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model.layers[2].input = x
                model.output
                late = model.layers[2].output
                given = model.layers[2].input
        assert torch.equal(late, net.layers[2](x))
        assert torch.equal(given, x)

    def test_edit_between_two_late_reads(self, net, x):
        model = NNsight(net)
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model.layers[5].output
                first = model.layers[3].output
                model.layers[8].output = x
                model.output
                second = model.layers[9].output
        assert torch.equal(first, outputs(net, x)["layers.3"][0])
        assert torch.equal(second, net.layers[9](x))

    def test_edit_of_the_root_input(self, net, x):
        model = NNsight(net)
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model.input = x * 2
                model.output
                late = model.layers[3].output
        assert torch.equal(late, outputs(net, x * 2)["layers.3"][0])

    def test_one_worker_editing_one_place_twice(self, net, x):
        model = NNsight(net)
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model.layers[2].output = x
                model.layers[2].output = model.layers[2].output + 1
                model.layers[2].output[:, 0] = 7
                shown = model.layers[2].output.clone()
                model.output
                late = model.layers[3].output
        expected = x + 1
        expected[:, 0] = 7
        assert torch.equal(shown, expected)
        assert torch.equal(late, net.layers[3](expected))

    def test_dropout(self, x):
        net = Sequential(Linear(4, 64), Dropout(0.5), Linear(64, 64), Dropout(0.5), Linear(64, 4))
        model = NNsight(net)
        torch.manual_seed(7)
        expected = outputs(net, x)
        following = torch.rand(3)
        for _ in range(2):
            torch.manual_seed(7)
            with pytest.warns(OutOfOrderWarning):
                with model.trace(x):
                    out = model.output
                    found = {name: model.get(name).output for name in ("1", "3", "2")}
            assert torch.equal(out, expected[""][0])
            assert all(torch.equal(found[name], expected[name][0]) for name in found)
            assert torch.equal(torch.rand(3), following)

    def test_edit_of_a_leaf_between_two_late_reads(self, net, x):
        model = NNsight(net)
        with model.trace(x):
            model.output
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model.layers[5].output
                model.layers[3].output
                model.layers[8][0].output[:] = 1
                model.output
                late = model.layers[9].input
        assert torch.equal(late, torch.ones(3, 4))

    def test_edits_of_every_layer_then_reads_in_any_order(self, net, x):
        model = NNsight(net)
        for _ in range(2):
            kept = {}
            with pytest.warns(OutOfOrderWarning):
                with model.trace(x):
                    for i, layer in enumerate(model.layers):
                        layer[0].output[:, i % 4] = i
                        kept[i] = layer.output.clone()
                    out = model.output
                    found = {i: model.layers[i].output for i in (7, 8, 3, 11, 0, 1, 10)}
            assert all(torch.equal(found[i], kept[i]) for i in found)
            assert torch.equal(out, net.head(kept[11]))

    def test_dropout_with_the_main_pass_in_between(self, x):
        net = Sequential(Linear(4, 64), Dropout(0.5), Linear(64, 64), Dropout(0.5), Linear(64, 4), Dropout(0.5))
        model = NNsight(net)
        torch.manual_seed(7)
        expected = outputs(net, x)
        torch.manual_seed(7)
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                model[3].output
                first = model[1].output
                out = model[5].output
                second = model[2].output
                third = model[3].output
        assert torch.equal(first, expected["1"][0])
        assert torch.equal(second, expected["2"][0])
        assert torch.equal(third, expected["3"][0])
        assert torch.equal(out, expected["5"][0])

    def test_random_numbers_drawn_by_the_body(self, x):
        net = Sequential(Linear(4, 64), Dropout(0.5), Linear(64, 4))
        model = NNsight(net)
        torch.manual_seed(7)
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x):
                torch.rand(5)
                main = model[1].output.clone()
                model.output
                torch.rand(5)
                late = model[1].output
        assert torch.equal(late, main)

    def test_an_error_in_the_second_pass_reaches_the_user(self, x):
        class Once(Module):
            def __init__(self):
                super().__init__()
                self.calls = 0

            def forward(self, x):
                self.calls += 1
                if self.calls > 1:
                    raise FileNotFoundError
                return x

        net = Sequential(Linear(4, 4), Once(), ReLU())
        model = NNsight(net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OutOfOrderWarning)
            with pytest.raises(FileNotFoundError):
                with model.trace(x):
                    model.output
                    model[1].output
        assert "forward" not in vars(net)


class TestNeverRan:
    @pytest.mark.parametrize("warm", [False, True])
    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize("name", ["unused", "unused_group", "unused_group.0"])
    @pytest.mark.parametrize("kind", ["output", "input"])
    @pytest.mark.filterwarnings("ignore::nnsight.errors.OutOfOrderWarning")
    def test_read(self, net, x, warm, late, name, kind):
        model = NNsight(net)
        if warm:
            with model.trace(x):
                model.output
        with pytest.raises(NeverRanError, match=re.escape(f"model.{name}.{kind}")):
            with model.trace(x):
                if late:
                    model.output
                getattr(model.get(name), kind)

    def test_no_warning_of_a_second_pass_that_serves_nothing(self, net, x):
        model = NNsight(net)
        for _ in range(2):  # warnings are errors
            with pytest.raises(NeverRanError):
                with model.trace(x):
                    model.layers[3].output
                    model.unused.output

    def test_write(self, net, x):
        model = NNsight(net)
        for _ in range(2):
            with pytest.raises(NeverRanError, match=re.escape("model.unused.output")):
                with model.trace(x):
                    model.unused.output = x

    def test_outside_a_trace(self, net):
        model = NNsight(net)
        with pytest.raises(NotTracingError, match=re.escape("model.layers.2")):
            model.layers[2].output
        with pytest.raises(ValueError, match=re.escape("model.layers.2")):
            model.layers[2].output = 0


class Branches(Module):
    """Which leaf runs, and how often, depends on the input."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.loop, self.after = (Linear(4, 4) for _ in range(4))
        self.relu = ReLU()

    def forward(self, x, which="left", times=1):
        x = self.left(x) if which == "left" else self.right(x)
        for _ in range(times):
            x = self.after(self.loop(x))
        return self.relu(x)


class TestSeveralCalls:
    def test_shared_leaf(self, x):
        torch.manual_seed(0)
        relu = ReLU()
        net = Sequential(Linear(4, 4), relu, Linear(4, 4), relu, Linear(4, 4))
        expected = outputs(net, x)
        model = NNsight(net)
        for _ in range(3):
            with model.trace(x):
                first = model[1].output
                out = model.output
            assert torch.equal(first, expected["1"][0])
            assert torch.equal(out, expected[""][0])
            with pytest.warns(OutOfOrderWarning):
                with model.trace(x):
                    model[2].output
                    late = model[1].output
            assert torch.equal(late, expected["1"][0])
            with pytest.raises(OutOfOrderError):
                with model.trace(x):
                    model[2].output
                    model[1].output = x

    def test_shared_leaf_under_two_parents(self, x):
        torch.manual_seed(0)
        relu = ReLU()
        net = Sequential(Sequential(Linear(4, 4), relu), Sequential(Linear(4, 4), relu))
        expected = outputs(net, x)
        model = NNsight(net)
        for _ in range(3):
            with pytest.warns(OutOfOrderWarning):
                with model.trace(x):
                    model[1][0].output
                    late = model[0][1].output
            assert torch.equal(late, expected["0.1"][0])

    def test_edit_of_the_first_call_alone(self, x):
        torch.manual_seed(0)
        relu = ReLU()
        net = Sequential(Linear(4, 4), relu, Linear(4, 4), relu)
        model = NNsight(net)
        for _ in range(2):
            with model.trace(x):
                model[1].output[:] = 1
                out = model.output
            assert torch.equal(out, relu(net[2](torch.ones(3, 4))))

    def test_a_leaf_that_another_input_had_not_called(self, x):
        torch.manual_seed(0)
        net = Branches()
        model = NNsight(net)
        with model.trace(x, which="left"):
            model.output
        expected = outputs(net, x, which="right")
        with model.trace(x, which="right"):
            found = model.right.output
            after = model.after.output
        assert torch.equal(found, expected["right"][0])
        assert torch.equal(after, expected["after"][0])
        with pytest.warns(OutOfOrderWarning):
            with model.trace(x, which="right"):
                model.relu.output
                late = model.right.output
        assert torch.equal(late, expected["right"][0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OutOfOrderWarning)
            with pytest.raises(NeverRanError):
                with model.trace(x, which="right"):
                    model.relu.output
                    model.left.output

    def test_a_leaf_called_more_often_than_with_another_input(self, x):
        torch.manual_seed(0)
        net = Branches()
        model = NNsight(net)
        with model.trace(x, times=1):
            model.output
        expected = outputs(net, x, times=3)
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OutOfOrderWarning)
                with model.trace(x, times=3):
                    after = model.after.output
                    looped = model.loop.output
            assert torch.equal(after, expected["after"][0])
            assert torch.equal(looped, expected["loop"][0])


class Aliases(Module):
    """Gives one tensor to two children, as a residual stream does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        return self.last(self.first(x) + self.second(x))


def test_an_edit_in_place_reaches_what_else_holds_the_tensor_in_the_second_pass() -> None:
    net = Aliases()
    model = NNsight(net)
    x = torch.rand(2, 3)
    with pytest.warns(OutOfOrderWarning), model.trace(x):
        model.first.input[:] *= 0.5
        model.last.output
        late = model.second.input.clone()
    assert torch.equal(late, x * 0.5)


def test_changed_in_place_and_then_replaced() -> None:
    net = Aliases()
    model = NNsight(net)
    x = torch.rand(2, 3)
    with pytest.warns(OutOfOrderWarning), model.trace(x):
        model.first.input[:] *= 0.5
        model.first.input = torch.zeros(2, 3)
        model.last.output
        first, second = model.first.output.clone(), model.second.input.clone()
    assert torch.equal(first, net.first(torch.zeros(2, 3)))
    assert torch.equal(second, x * 0.5)


@pytest.mark.parametrize("whole", [False, True])
def test_an_invoke_assigns_and_then_changes_in_place(whole: bool) -> None:
    net = Aliases()
    model = NNsight(net)
    x = torch.rand(2, 3)
    with pytest.warns(OutOfOrderWarning), model.trace() as tracer:
        with tracer.invoke(x[:1]):
            model.second.output
            late = model.first.input.clone()
        with tracer.invoke(x[1:]):
            model.first.output = model.first.output * 0.5
            model.first.output[:] += 1
        with tracer.invoke():
            if whole:
                model.first.output[:] *= 2
            result = model.last.input.clone()
    edited = torch.cat([net.first(x[:1]), net.first(x[1:]) * 0.5 + 1]) * (2 if whole else 1)
    assert torch.equal(late, x[:1])
    assert torch.allclose(result, edited + net.second(x), atol=1e-6)
