"""What a trace leaves behind: what was kept, and nothing else, without the help of the garbage collector."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch.nn import Linear, Module, ReLU, Sequential

from nnsight import NNsight
from nnsight.errors import NeverRanError, OutOfOrderError


@pytest.fixture(autouse=True)
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Probe(Module):
    """Passes a copy on, and remembers it weakly."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        out = x.clone()
        self.seen.append(weakref.ref(out))
        return out

    def alive(self):
        return sum(reference() is not None for reference in self.seen)


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layers = Sequential(*(Sequential(Linear(4, 4), ReLU(), Probe()) for _ in range(5)))
        self.unused = Linear(4, 4)

    def forward(self, x):
        return self.layers(x)


def probes(net):
    return [layer[2] for layer in net.layers]


def read(model, x):
    with model.trace(x):
        return [model.layers[i].output.sum().item() for i in range(5)]


def edit(model, x):
    with model.trace(x):
        model.layers[1].output[:] = 0
        model.layers[2].output = torch.zeros(2, 4)
        model.layers[3].input = model.layers[3].input + 1
        return model.output.sum().item()


def read_early(model, x):
    with pytest.warns(UserWarning, match="second forward"):
        with model.trace(x):
            model.layers[2].output[:] = 0
            model.output
            return model.layers[1].output.sum().item()


def use_result(model, x):
    with model.trace(x) as tracer:
        return tracer.result.sum().item()


def stop(model, x):
    with model.trace(x) as tracer:
        model.layers[1].output.save()
        tracer.stop()


def do_nothing(model, x):
    with model.trace(x):
        pass


def fail_in_body(model, x):
    with pytest.raises(ZeroDivisionError):
        with model.trace(x):
            hidden = model.layers[1].output
            1 / 0


def fail_in_model(model, x):
    with pytest.raises(RuntimeError):
        with model.trace(x):
            model.layers[1].output = torch.zeros(2, 5)


def handle_failure_of_the_model(model, x):
    with model.trace(x):
        model.layers[1].output = torch.zeros(2, 5)
        with contextlib.suppress(RuntimeError):
            model.output


def handle_late_write(model, x):
    with model.trace(x):
        model.layers[3].output
        with contextlib.suppress(OutOfOrderError):
            model.layers[1].output = 0


def handle_late_write_outside(model, x):
    with pytest.raises(OutOfOrderError):
        with model.trace(x):
            model.layers[3].output
            model.layers[1].output = 0


def handle_never_ran(model, x):
    with model.trace(x):
        with contextlib.suppress(NeverRanError):
            model.unused.output


def interrupt(model, x):
    with pytest.raises(KeyboardInterrupt):
        with model.trace(x):
            model.layers[1].output
            raise KeyboardInterrupt


def abandon(model, x):
    model.trace(x)


def nest(model, x):
    with model.trace(x):
        model.layers[1].output
        with model.trace(x):
            model.layers[1].output
        model.layers[2].output


BODIES = [
    read,
    edit,
    read_early,
    use_result,
    stop,
    do_nothing,
    fail_in_body,
    fail_in_model,
    handle_failure_of_the_model,
    handle_late_write,
    handle_late_write_outside,
    handle_never_ran,
    interrupt,
    abandon,
    nest,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_nothing_outlives_the_model(body):
    net, x = Net(), torch.randn(2, 4)
    model = NNsight(net)
    for _ in range(2):
        body(model, x)
    activations = [reference for probe in probes(net) for reference in probe.seen]
    kept = [weakref.ref(found) for found in (x, model, model.layers[1], *net.modules(), *net.parameters())]
    del net, model, x
    assert [found() for found in kept if found() is not None] == []
    assert [found() for found in activations if found() is not None] == []


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_no_activation_outlives_the_trace(body):
    with torch.no_grad():  # a graph would rightly hold some
        net, x = Net(), torch.randn(2, 4)
        model = NNsight(net)
        for _ in range(2):
            body(model, x)
            assert [probe.alive() for probe in probes(net)] == [0] * 5


def test_a_kept_value_keeps_itself_alone():
    with torch.no_grad():
        net = Net()
        model = NNsight(net)
        for _ in range(2):
            with model.trace(torch.randn(2, 4)):
                model.layers[0].output
                kept = model.layers[2].output.save()
                model.layers[3].output[:] = 0
            del model.layers[2]._module[2].seen[:-1]
            assert [probe.alive() for probe in probes(net)] == [0, 0, 1, 0, 0]
        del kept
        assert [probe.alive() for probe in probes(net)] == [0] * 5


def test_a_value_kept_from_a_second_pass_keeps_itself_alone():
    with torch.no_grad():
        net = Net()
        model = NNsight(net)
        with pytest.warns(UserWarning, match="second forward"):
            with model.trace(torch.randn(2, 4)):
                model.output
                kept = model.layers[2].output.save()
        assert [probe.alive() for probe in probes(net)] == [0] * 5  # a detached view of the probe's own
        base = kept.untyped_storage().nbytes()
        assert base == 2 * 4 * 4


def test_values_are_let_go_of_while_the_trace_runs():
    with torch.no_grad():
        net = Net()
        model = NNsight(net)
        with model.trace(torch.randn(2, 4)):
            for i in range(5):
                model.layers[i].output.sum()
            model.output
            assert [probe.alive() for probe in probes(net)] == [0, 0, 0, 0, 1]


def test_the_input_is_let_go_of():
    with torch.no_grad():
        model = NNsight(Net())
        x = torch.randn(2, 4)
        gone = weakref.ref(x)
        with model.trace(x):
            kept = model.layers[2].output.save()
        del x
        assert gone() is None


def test_an_error_kept_by_the_user_does_not_keep_the_run():
    with torch.no_grad():
        net = Net()
        model = NNsight(net)
        with pytest.raises(ZeroDivisionError) as caught:
            with model.trace(torch.randn(2, 4)):
                model.layers[1].output
                1 / 0
        assert [probe.alive() for probe in probes(net)] == [0] * 5
        assert caught.value is not None
