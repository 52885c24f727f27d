"""Outside a trace the model is what it was: no hooks, no replaced forwards, whatever ended the trace."""

import copy
import pickle
import sys
import threading
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.nn import Linear, Module, ModuleList, ReLU, Sequential
from torch.utils.checkpoint import checkpoint

from nnsight import NNsight


class Block(Module):
    def __init__(self, act):
        super().__init__()
        self.lin = Linear(4, 4)
        self.act = act

    def forward(self, x):
        return x + self.act(self.lin(x))


class Net(Module):
    def __init__(self):
        super().__init__()
        act = ReLU()
        self.blocks = ModuleList([Block(act), Block(act)])
        self.tied = self.blocks[0].lin
        self.head = Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.tied(x))


class Scale(ModelHook):
    def post_forward(self, module, output):
        return output * 2


def with_hooks(net):
    net.blocks[0].register_forward_hook(lambda module, args, output: output + 1)
    net.blocks[0].lin.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    net.blocks[1].lin.register_forward_hook(lambda module, args, kwargs, output: output * 2, with_kwargs=True)
    net.head.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    net.register_forward_hook(lambda module, args, output: output - 1)


def with_own_forwards(net):
    for module in (net, net.blocks[0], net.blocks[1].lin):
        add_hook_to_module(module, Scale())


def plainly(net):
    pass


def with_both(net):
    with_hooks(net)
    with_own_forwards(net)


KINDS = [plainly, with_hooks, with_own_forwards, with_both]


def state(module):
    """`vars` of every module, with copies of what a trace could change in place."""
    return [
        {name: dict(value) if isinstance(value, (dict, OrderedDict)) else value for name, value in vars(m).items()}
        for m in module.modules()
    ]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def net(request):
    torch.manual_seed(0)
    net = Net()
    request.param(net)
    return net


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 4)


def observed(net, call):
    """What every module is called with and returns, after all other hooks, by plain hooks."""
    seen, handles = {}, []
    for name, module in net.named_modules():

        def look(module, args, output, name=name):
            seen.setdefault(name, []).append((args[0].detach().clone(), output.detach().clone()))

        handles.append(module.register_forward_hook(look))
    result = call()
    for handle in handles:
        handle.remove()
    return seen, result


class Stop(Exception):
    pass


def read(model):
    for envoy in (
        model.blocks[0].lin,
        model.blocks[0].act,
        model.blocks[0],
        model.blocks[1].lin,
        model.head,
        model,
    ):
        envoy.output


def edit(model):
    model.blocks[0].lin.output = model.blocks[0].lin.output * 2
    model.blocks[1].input = model.blocks[1].input + 1
    model.head.output[:] = 0


def fail_in_body(model):
    model.blocks[0].lin.output
    raise Stop


def fail_before_anything(model):
    raise Stop


def fail_at_the_end(model):
    model.output
    raise Stop


def fail_in_model(model):
    model.blocks[0].act.output
    model.blocks[1].lin.input = torch.ones(3, 5)


def interrupt(model):
    model.blocks[0].lin.output
    raise KeyboardInterrupt


def exit_program(model):
    model.blocks[0].lin.output
    raise SystemExit


def read_early(model):
    with pytest.warns(UserWarning, match="second forward"):
        model.head.output
        model.blocks[0].lin.output


ENDINGS = {
    read: None,
    edit: None,
    read_early: None,
    fail_in_body: Stop,
    fail_before_anything: Stop,
    fail_at_the_end: Stop,
    fail_in_model: RuntimeError,
    interrupt: KeyboardInterrupt,
    exit_program: SystemExit,
}


@pytest.mark.parametrize("body", ENDINGS, ids=lambda body: body.__name__)
def test_every_module_is_as_before(net, x, body):
    before, expected = state(net), net(x)
    model = NNsight(net)
    assert state(net) == before
    for _ in range(2):
        if ENDINGS[body] is None:
            with model.trace(x):
                body(model)
        else:
            with pytest.raises(ENDINGS[body]):
                with model.trace(x):
                    body(model)
        assert state(net) == before
    assert torch.equal(net(x), expected)


def test_every_module_is_as_before_a_stop(net, x):
    before = state(net)
    model = NNsight(net)
    for _ in range(2):
        with model.trace(x) as tracer:
            model.blocks[0].output
            tracer.stop()
        assert state(net) == before


def test_every_module_is_as_before_an_interrupt_in_the_model(x):
    class Interrupted(Module):
        def forward(self, x):
            raise KeyboardInterrupt

    net = Sequential(Linear(4, 4), Interrupted(), ReLU())
    model, before = NNsight(net), state(net)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            with model.trace(x):
                model[2].output
        assert state(net) == before


def test_every_module_is_as_before_an_error_in_a_hook(x):
    net = Sequential(Linear(4, 4), ReLU())

    def refuse(module, args, output):
        raise Stop

    net[0].register_forward_hook(refuse)
    model, before = NNsight(net), state(net)
    for _ in range(2):
        with pytest.raises(Stop):
            with model.trace(x):
                model[0].output
        assert state(net) == before


def test_every_module_is_as_before_for_a_bare_leaf(x):
    net = Linear(4, 4)
    model, before = NNsight(net), state(net)
    with model.trace(x):
        out = model.output.save()
    assert state(net) == before
    assert torch.equal(out, net(x))


def test_a_trace_that_is_never_entered_touches_nothing(net, x):
    before = state(net)
    NNsight(net).trace(x)
    assert state(net) == before


class TestHooksOfTheUser:
    """`.output` is what the next module gets: after the user's own hooks."""

    def test_reads(self, net, x):
        seen, _ = observed(net, lambda: net(x))
        model = NNsight(net)
        for _ in range(2):
            with model.trace(x):
                found = {}
                for name in ("blocks.0.lin", "blocks.0", "blocks.1.lin", "blocks.1", "head", ""):
                    envoy = model.get(name)
                    found[name] = (envoy.output.clone(), envoy.input.clone())
            for name, (output, given) in found.items():
                assert torch.equal(output, seen[name][0][1]), name
                assert torch.equal(given, seen[name][0][0]), name

    def test_result(self, net, x):
        expected = net(x)
        model = NNsight(net)
        with model.trace(x) as tracer:
            output = model.output
            result = tracer.result
        assert torch.equal(output, expected)
        assert torch.equal(result, expected)

    @pytest.mark.parametrize("name", ["blocks.0.lin", "blocks.0", "blocks.1.lin", "blocks.1", "head"])
    def test_edits(self, net, x, name):
        torch.manual_seed(3)
        value = torch.randn_like(observed(net, lambda: net(x))[0][name][0][1])
        calls = []
        module = net.get_submodule(name)

        def replace(module, args, output):
            calls.append(1)
            return value.clone() if len(calls) == 1 else None

        handle = module.register_forward_hook(replace)
        expected = net(x)
        handle.remove()
        model = NNsight(net)
        with model.trace(x):
            model.get(name).output = value.clone()
            assigned = model.output
        assert torch.equal(assigned, expected)
        with model.trace(x):
            model.get(name).output[:] = value
            in_place = model.output
        assert torch.equal(in_place, expected)

    def test_input_is_what_the_pre_hook_leaves(self, x):
        net = Sequential(Linear(4, 4), Linear(4, 4))
        net[1].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
        model = NNsight(net)
        with model.trace(x):
            given = model[1].input
            model[1].input = given + 1
            out = model.output
        assert torch.equal(given, net[0](x) * 3)
        assert torch.equal(out, torch.nn.functional.linear(given + 1, net[1].weight, net[1].bias))

    def test_global_hook(self, x):
        net = Sequential(Linear(4, 4), ReLU())
        model = NNsight(net)

        def add(module, args, output):
            return output + 1 if module is net[0] else None

        handle = torch.nn.modules.module.register_module_forward_hook(add)
        try:
            expected = net(x)
            with model.trace(x):
                hidden = model[0].output.clone()
                model[0].output = hidden
                out = model.output
        finally:
            handle.remove()
        assert torch.equal(hidden, net[0](x) + 1)
        assert torch.equal(out, expected)


class TestOverlappingWrappers:
    def test_nested_root_outside(self, net, x):
        before, expected = state(net), observed(net, lambda: net(x))[0]
        inner_alone = net.blocks[0](x + 1)
        root, part = NNsight(net), NNsight(net.blocks[0])
        for _ in range(2):
            with root.trace(x):
                first = root.blocks[0].lin.output
                with part.trace(x + 1):
                    inner = part.lin.output
                    whole = part.output
                second = root.blocks[1].lin.output
                out = root.output
            assert state(net) == before
            assert torch.equal(first, expected["blocks.0.lin"][0][1])
            assert torch.equal(second, expected["blocks.1.lin"][0][1])
            assert torch.equal(out, expected[""][0][1])
            assert torch.equal(whole, inner_alone)
            assert inner.shape == first.shape
            assert not torch.equal(inner, first)

    def test_nested_part_outside(self, net, x):
        before, expected = state(net), observed(net, lambda: net(x))[0]
        inner_alone = net.blocks[0](x + 1)
        root, part = NNsight(net), NNsight(net.blocks[0])
        for _ in range(2):
            with part.trace(x + 1):
                part.lin.output
                with root.trace(x):
                    first = root.blocks[0].lin.output
                    out = root.output
                whole = part.output
            assert state(net) == before
            assert torch.equal(first, expected["blocks.0.lin"][0][1])
            assert torch.equal(out, expected[""][0][1])
            assert torch.equal(whole, inner_alone)

    def test_interleaved(self, net, x):
        before = state(net)
        expected, part_alone = net(x), net.blocks[0](x + 1)
        root, part = NNsight(net), NNsight(net.blocks[0])
        first, second = root.trace(x), part.trace(x + 1)
        first.__enter__()
        root.blocks[0].lin.output
        second.__enter__()
        part.lin.output
        whole = part.output
        second.__exit__(None, None, None)
        out = root.output
        first.__exit__(None, None, None)
        assert state(net) == before
        assert torch.equal(out, expected)
        assert torch.equal(whole, part_alone)

    def test_the_same_model_inside_its_own_trace(self, net, x):
        before = state(net)
        expected, other = net(x), net(x + 1)
        model = NNsight(net)
        with model.trace(x):
            model.blocks[0].output
            with model.trace(x + 1):
                inside = model.output
            outside = model.output
        assert state(net) == before
        assert torch.equal(inside, other)
        assert torch.equal(outside, expected)

    def test_threads(self, net, x):
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            self.check_threads(net, x)
        finally:
            sys.setswitchinterval(interval)

    def check_threads(self, net, x):
        before = state(net)
        seen = observed(net, lambda: net(x))[0]
        alone = net.blocks[0](x)
        root, part = NNsight(net), NNsight(net.blocks[0])
        barrier = threading.Barrier(4)

        def trace_root(number):
            barrier.wait()
            for _ in range(60):
                with root.trace(x):
                    first = root.blocks[0].lin.output
                    last = root.head.output
                assert torch.equal(first, seen["blocks.0.lin"][0][1])
                assert torch.equal(last, seen["head"][0][1])

        def trace_part(number):
            barrier.wait()
            for _ in range(120):
                with part.trace(x):
                    part.lin.output
                    part.act.output
                    whole = part.output
                assert torch.equal(whole, alone)

        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(job, n) for n, job in enumerate((trace_root, trace_part) * 2)]
            for job in jobs:
                job.result(60)
        assert state(net) == before


class TestUnusualModules:
    def test_scripted_leaf(self, x):
        leaf = scripted(Linear(4, 4))
        net = Sequential(leaf, ReLU())
        before, model = state(net), NNsight(net)
        for _ in range(2):
            with model.trace(x):
                hidden = model[0].output
                model[1].output = torch.zeros(3, 4)
                out = model.output
            assert state(net) == before
        assert torch.equal(hidden, leaf(x))
        assert not out.any()

    def test_scripted_container(self, x):
        inner = scripted(Sequential(Linear(4, 4), ReLU()))
        net = Sequential(inner, Linear(4, 4))
        model = NNsight(net)
        with model.trace(x):
            hidden = model[0].output
            out = model.output
        assert torch.equal(hidden, inner(x))
        assert torch.equal(out, net(x))

    def test_compiled_in_place(self, x):
        net = Sequential(Sequential(Linear(4, 4), ReLU()), Linear(4, 4))
        net[0].compile(backend="eager")
        expected = net(x)
        model = NNsight(net)
        for _ in range(2):
            with model.trace(x):
                hidden = model[0].output
                model[0].output = torch.zeros(3, 4)
                out = model.output
            assert torch.equal(hidden, net[0](x))
            assert torch.equal(out, net[1](torch.zeros(3, 4)))
            assert torch.equal(net(x), expected)

    def test_traced_by_the_script_compiler(self, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inner = torch.jit.trace(Sequential(Linear(4, 4), ReLU()), x)
        net = Sequential(inner, Linear(4, 4))
        model = NNsight(net)
        for _ in range(2):
            with model.trace(x):
                hidden = model[0].output
                model[0].output = torch.zeros(3, 4)
                out = model.output
            assert torch.equal(hidden, inner(x))
            assert torch.equal(out, net[1](torch.zeros(3, 4)))

    def test_compiled_leaf_and_root(self, x):
        net = Sequential(Linear(4, 4), ReLU())
        net[0].compile(backend="eager")
        net.compile(backend="eager")
        expected = net(x)
        before, model = [dict(vars(module)) for module in net.modules()], NNsight(net)
        for _ in range(2):
            with model.trace(x):
                hidden = model[0].output
                hidden[:] = 1
                out = model.output
            assert torch.equal(out, torch.ones(3, 4))
            assert [dict(vars(module)) for module in net.modules()] == before
            assert torch.equal(net(x), expected)

    def test_compiled_wrapper_as_root(self, x):
        net = Sequential(Linear(4, 4), ReLU())
        compiled = torch.compile(net, backend="eager")
        expected = compiled(x)
        model = NNsight(compiled)
        for _ in range(2):
            with model.trace(x):
                hidden = model.get("_orig_mod.0").output
                out = model.output
            assert torch.equal(hidden, net[0](x))
            assert torch.equal(out, expected)
            assert torch.equal(compiled(x), expected)

    def test_compiled_wrapper(self, x):
        net = Sequential(torch.compile(Sequential(Linear(4, 4), ReLU()), backend="eager"), Linear(4, 4))
        expected = net(x)
        model = NNsight(net)
        for _ in range(2):
            with model.trace(x):
                model[0].output = torch.zeros(3, 4)
                out = model.output
            assert torch.equal(out, net[1](torch.zeros(3, 4)))
            assert torch.equal(net(x), expected)

    def test_parametrized(self, x):
        net = Sequential(torch.nn.utils.parametrizations.weight_norm(Linear(4, 4)), ReLU())
        before, model = state(net), NNsight(net)
        for _ in range(2):
            with model.trace(x):
                hidden = model[0].output
            assert state(net) == before
            assert torch.equal(hidden, net[0](x))

    def test_attributes_of_another_module(self, x):
        class Delegates(Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def __getattr__(self, name):
                try:
                    return super().__getattr__(name)
                except AttributeError:
                    return getattr(super().__getattr__("inner"), name)

            def forward(self, x):
                return self.inner(x) + 1

        net = Sequential(Delegates(Linear(4, 4)), ReLU())
        before, model = state(net), NNsight(net)
        for _ in range(2):
            with model.trace(x):
                inner = model[0].inner.output
                hidden = model[0].output
            assert state(net) == before
            assert torch.equal(inner + 1, hidden)

    def test_call_of_its_own(self, x):
        class Doubles(Linear):
            def __call__(self, x):
                return super().__call__(x) * 2

        net = Sequential(Doubles(4, 4), ReLU())
        model = NNsight(net)
        with model.trace(x):
            hidden = model[0].output
            given = model[1].input
        assert torch.equal(given, hidden * 2)

    def test_root_that_calls_itself(self, x):
        class Recursive(Module):
            def __init__(self):
                super().__init__()
                self.lin = Linear(4, 4)

            def forward(self, x, depth=2):
                return self(self.lin(x), depth - 1) if depth else x

        net = Recursive()
        model = NNsight(net)
        for _ in range(2):
            with model.trace(x):
                first = model.lin.output
                out = model.output
            assert torch.equal(first, net.lin(x))
            assert torch.equal(out, net(x))

    def test_checkpointed(self, x):
        class Checkpointed(Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = Linear(4, 4), Linear(4, 4)

            def forward(self, x):
                return self.second(checkpoint(self.first, x, use_reentrant=False))

        net = Checkpointed()
        model = NNsight(net)
        x.requires_grad_()
        net(x).sum().backward()
        expected, x.grad = x.grad, None
        for _ in range(2):
            with model.trace(x):
                model.first.output
                model.output.sum().backward()
            assert torch.equal(x.grad, expected)
            x.grad = None

    def test_forward_assigned_in_the_body_stays(self, x):
        net = Sequential(Linear(4, 4), ReLU())
        model = NNsight(net)

        def own(x):
            return x * 0

        with model.trace(x):
            model[1].input
            net[1].forward = own
        assert vars(net[1])["forward"] is own
        assert not net(x).any()

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
    def test_a_copy_made_in_the_body_is_a_model_of_its_own(self, x, duplicate):
        net = Net()
        model = NNsight(net)
        with model.trace(x):
            model.blocks[0].lin.output
            twin = duplicate(net)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(x).any()
        assert net(x).any()
        with NNsight(twin).trace(x):
            pass
        again = NNsight(twin)
        with again.trace(x):
            hidden = again.blocks[0].lin.output
        assert not hidden.any()


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)
