"""Grad mode, inference mode, autocast and device blocks of body and model stay on their own side."""

import contextlib
import threading

import pytest
import torch
from torch.nn import Linear, Module, ModuleList

from nnsight import NNsight


class Recorder(Module):
    """A linear layer that notes the modes it is called under."""

    def __init__(self):
        super().__init__()
        self.lin = Linear(4, 4)
        self.seen = []

    def forward(self, x):
        self.seen.append(modes())
        return self.lin(x)


class Net(Module):
    """Three recorders, the middle one under `inside`."""

    def __init__(self, inside=contextlib.nullcontext):
        super().__init__()
        self.layers = ModuleList([Recorder() for _ in range(3)])
        self.inside = inside

    def forward(self, x):
        x = self.layers[0](x)
        with self.inside():
            x = self.layers[1](x)
        return self.layers[2](x.to(torch.float32, copy=True))


class Whole(Net):
    """All of the forward under `inside`, as a decorated `generate` is."""

    def forward(self, x):
        with self.inside():
            for layer in self.layers:
                x = layer(x)
            return x * 1


def modes():
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "device": torch.empty(0).device.type,
        "function modes": torch._C._len_torch_function_stack(),
    }


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def meta():
    return torch.device("meta")


CONTEXTS = [torch.no_grad, torch.enable_grad, torch.inference_mode, bfloat16, meta]
NAMES = [context.__name__ for context in CONTEXTS]
PLAIN = modes()


@pytest.fixture(autouse=True)
def nothing_leaks():
    yield
    left = modes()
    if left["inference"]:  # one failure shall not bring the next
        guard = [torch._C._InferenceMode(False)]
        thread = threading.Thread(target=guard.clear)
        thread.start()
        thread.join()
    assert left == PLAIN


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 4)


def expected_in(context):
    with context():
        return modes()


def wrapped(net_class, *args):
    torch.manual_seed(1)
    net = net_class(*args)
    return net, NNsight(net)


def seen(net):
    found = [layer.seen[-1] for layer in net.layers]
    for layer in net.layers:
        layer.seen.clear()
    return found


class TestModesOfTheBody:
    @pytest.mark.parametrize("context", CONTEXTS, ids=NAMES)
    def test_do_not_reach_the_layers_that_follow(self, context, x):
        net, model = wrapped(Net)
        expected = expected_in(context)
        for _ in range(2):
            with model.trace(x):
                with context():
                    inside = modes()
                    model.layers[0].output
                    between = modes()
                    model.layers[1].output
                    assert modes() == between == inside == expected
                out = model.output
            assert seen(net) == [PLAIN] * 3
            assert out.requires_grad
            assert torch.equal(out, net(x))

    @pytest.mark.parametrize("context", CONTEXTS, ids=NAMES)
    def test_around_the_end_of_the_forward(self, context, x):
        net, model = wrapped(Net)
        expected = expected_in(context)
        with model.trace(x):
            with context():
                out = model.output
                assert modes() == expected
        assert seen(net) == [PLAIN] * 3
        assert out.requires_grad

    @pytest.mark.parametrize("context", CONTEXTS, ids=NAMES)
    def test_around_the_trace_hold_in_the_model(self, context, x):
        net, model = wrapped(Net)
        expected = expected_in(context)
        with context():
            with model.trace(x):
                assert modes() == expected
                model.layers[1].output
                assert modes() == expected
                out = model.output
        assert seen(net) == [expected] * 3
        with context():
            assert torch.equal(out, net(x)) or out.is_meta

    @pytest.mark.parametrize("context", CONTEXTS, ids=NAMES)
    def test_are_gone_after_an_error_in_them(self, context, x):
        _, model = wrapped(Net)
        with pytest.raises(ZeroDivisionError):
            with model.trace(x):
                with context():
                    model.layers[0].output
                    1 / 0
        with pytest.raises(RuntimeError):
            with model.trace(x):
                with context():
                    model.layers[0].output = torch.zeros(2, 5)
                    model.output

    def test_gradients_flow_through_a_pause_without_gradients(self, x):
        net, model = wrapped(Net)
        net(x).sum().backward()
        expected = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        with model.trace(x):
            with torch.no_grad():
                norm = model.layers[0].output.norm()
            model.output.sum().backward()
        assert not norm.requires_grad
        for parameter, grad in zip(net.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, grad)


class TestModesOfTheModel:
    @pytest.mark.parametrize("kind", [Net, Whole])
    @pytest.mark.parametrize("context", CONTEXTS[:-1], ids=NAMES[:-1])
    def test_hold_in_the_model_and_end_with_it(self, context, kind, x):
        net, model = wrapped(kind, context)
        expected = net(x)
        plainly = seen(net)
        for _ in range(2):
            with model.trace(x):
                for envoy in (*model.layers, model):
                    envoy.output
                    assert modes() | {"function modes": 0} == PLAIN
                assert modes() == PLAIN
                out = model.output
            assert seen(net) == plainly
            assert torch.equal(out, expected)
            assert modes() == PLAIN

    @pytest.mark.parametrize("kind", [Net, Whole])
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_in_place_edits(self, context, kind, x):
        net, model = wrapped(kind, context)

        def zero(module, args, output):
            output[:, 0] = 0

        handle = net.layers[1].register_forward_hook(zero)
        expected = net(x)
        handle.remove()
        for _ in range(2):
            with model.trace(x):
                model.layers[1].output[:, 0] = 0
                out = model.output
            assert torch.equal(out, expected)
            with model.trace(x):
                value = model.layers[1].output.clone()
                value[:, 0] = 0
                model.layers[1].output = value
                out = model.output
            assert torch.equal(out, expected)
        assert not torch.equal(net(x), expected)

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_the_body_gets_its_own_mode_back_before_the_model_has_ended(self, context, x):
        _, model = wrapped(Net, context)
        with model.trace(x):
            model.layers[1].output
            model.layers[2].output
            assert modes() == PLAIN
            weight = torch.ones(3, requires_grad=True)
            assert (weight * 2).requires_grad

    def test_inference_mode_of_the_body_survives_that_of_the_model(self, x):
        _, model = wrapped(Net, torch.inference_mode)
        with model.trace(x):
            model.layers[1].output
            with torch.inference_mode():
                model.layers[2].output
                inside = modes()
            after = modes()
        assert inside == expected_in(torch.inference_mode)
        assert after == PLAIN

    def test_inference_mode_of_the_body_ends_within_that_of_the_model(self, x):
        _, model = wrapped(Whole, torch.inference_mode)
        with model.trace(x):
            with torch.inference_mode():
                model.layers[0].output
                model.layers[1].output
            model.layers[2].output[:] = 0
            out = model.output
            assert torch.equal(out, torch.zeros(2, 4))

    def test_errors_under_inference_mode(self, x):
        _, model = wrapped(Whole, torch.inference_mode)
        with pytest.raises(ZeroDivisionError):
            with model.trace(x):
                model.layers[0].output
                1 / 0
        assert modes() == PLAIN
        with pytest.raises(RuntimeError):
            with model.trace(x):
                model.layers[0].output = torch.zeros(2, 5)
        assert modes() == PLAIN

    def test_stop_under_inference_mode(self, x):
        _, model = wrapped(Whole, torch.inference_mode)
        with model.trace(x) as tracer:
            model.layers[0].output
            tracer.stop()
            assert modes() == PLAIN

    def test_second_pass_under_no_grad(self, x):
        net, model = wrapped(Whole, torch.no_grad)
        expected = net.layers[0].lin(x)
        with pytest.warns(UserWarning, match="second forward"):
            with model.trace(x):
                model.output
                with torch.no_grad():
                    late = model.layers[0].output
                assert modes() == PLAIN
        assert torch.equal(late, expected)
        assert seen(net) == [expected_in(torch.no_grad)] * 3

    def test_mixed_autocast(self, x):
        _, model = wrapped(Whole, bfloat16)
        with model.trace(x):
            hidden = model.layers[0].output
            assert hidden.dtype == torch.bfloat16
            own = torch.ones(2, 2) @ torch.ones(2, 2)
            assert own.dtype == torch.float32
            assert model.layers[1].output.dtype == torch.bfloat16

    def test_modes_inside_a_nested_trace(self, x):
        net, model = wrapped(Whole, torch.no_grad)
        _, inner = wrapped(Net, bfloat16)
        with model.trace(x):
            model.layers[0].output
            with torch.no_grad():
                with inner.trace(x):
                    assert inner.layers[1].output.dtype == torch.bfloat16
                    assert modes() == expected_in(torch.no_grad)
                    model.layers[1].output
                    inner.layers[2].output
                    assert modes() == expected_in(torch.no_grad)
            assert modes() == PLAIN
        assert seen(net) == [expected_in(torch.no_grad)] * 3


class TestDeferredBlocks:
    """The block of an invoke keeps its modes where it waits, and the model and other blocks keep theirs."""

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, bfloat16])
    def test_modes_of_a_block_do_not_reach_the_model(self, context, x):
        net, model = wrapped(Net)
        for _ in range(2):  # the first time the rows of each value are learnt, in forwards of their own
            for layer in net.layers:
                layer.seen.clear()
            with model.trace() as tracer:
                with tracer.invoke(x):
                    with context():
                        model.layers[0].output
                        model.layers[1].output
                        inside = modes()
                    model.layers[2].output
                    after = modes()
                with tracer.invoke(x):
                    model.layers[1].output
                    other = modes()
        assert inside == expected_in(context)
        assert after == other == PLAIN
        assert seen(net) == [PLAIN] * 3

    def test_modes_of_the_model_do_not_reach_a_block(self, x):
        net, model = wrapped(Whole, torch.inference_mode)
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.layers[0].output[:] = 0
                edited = model.layers[0].output.clone()
                inside = modes()
        assert not edited.any()
        assert inside["grad"]
        assert not inside["inference"]
        assert net.layers[1].seen[-1] == expected_in(torch.inference_mode)

    def test_error_inside_a_context(self, x):
        _, model = wrapped(Net)
        with pytest.raises(ZeroDivisionError):
            with model.trace() as tracer:
                with tracer.invoke(x):
                    with torch.no_grad():
                        model.layers[2].output
                with tracer.invoke(x):
                    model.layers[1].output
                    1 / 0
        assert modes() == PLAIN
