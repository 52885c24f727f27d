"""Several threads may use one model object at once, with and without traces."""

import gc
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import greenlet
import pytest
import torch
from torch.nn import Linear, Module, ModuleList, ReLU

from nnsight import NNsight

THREADS = 8


class Block(Module):
    def __init__(self):
        super().__init__()
        self.lin = Linear(8, 8)
        self.act = ReLU()

    def forward(self, x):
        return x + self.act(self.lin(x))


class Net(Module):
    def __init__(self):
        super().__init__()
        self.blocks = ModuleList([Block() for _ in range(4)])
        self.head = Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(autouse=True)
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def inputs(count):
    torch.manual_seed(1)
    return [torch.randn(2, 8) for _ in range(count)]


def together(jobs):
    """Run the functions at the same moment, one a thread; their results."""
    barrier = threading.Barrier(len(jobs))

    def start(job):
        barrier.wait(60)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [pool.submit(start, job) for job in jobs]
        return [job.result(120) for job in running]


def trace(model, x, number):
    """Reads, and two kinds of edits, that differ from thread to thread."""
    layer = number % 4
    with model.trace(x):
        before = model.blocks[layer].lin.output.clone()
        model.blocks[layer].lin.output[:] = before * number
        after = model.blocks[layer].act.output.clone()
        if layer < 3:
            model.blocks[3].output = model.blocks[3].output + number
        out = model.output
    return before, after, out


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_traces_of_one_model_object_agree_with_those_of_one_thread(net):
    model = NNsight(net)
    xs = inputs(THREADS)
    alone = [trace(model, x, number) for number, x in enumerate(xs)]

    def job(number):
        def run():
            return all(same(trace(model, xs[number], number), alone[number]) for _ in range(50))

        return run

    assert together([job(number) for number in range(THREADS)]) == [True] * THREADS


def test_first_traces_of_a_model_may_be_concurrent():
    for _ in range(20):
        torch.manual_seed(0)
        net = Net()
        model, xs = NNsight(net), inputs(THREADS)
        alone = [trace(NNsight(copy_of(net)), x, number) for number, x in enumerate(xs)]
        found = together([partial(trace, model, x, number) for number, x in enumerate(xs)])
        assert [same(*pair) for pair in zip(found, alone, strict=True)] == [True] * THREADS


def copy_of(net):
    copy = Net()
    copy.load_state_dict(net.state_dict())
    return copy


def test_wrappers_made_at_once_share_the_model(net):
    xs = inputs(THREADS)
    alone = [trace(NNsight(net), x, number) for number, x in enumerate(xs)]
    for _ in range(10):
        found = together([lambda n=n: trace(NNsight(net), xs[n], n) for n in range(THREADS)])
        assert [same(*pair) for pair in zip(found, alone, strict=True)] == [True] * THREADS


def test_plain_calls_in_other_threads_are_left_alone(net):
    model = NNsight(net)
    x = inputs(1)[0]
    expected = net(x)
    stop = threading.Event()
    calls = []

    def call_plainly():
        while not stop.is_set():
            assert torch.equal(net(x), expected)
            calls.append(1)

    def edit():
        try:
            for number in range(200):
                with model.trace(x):
                    model.blocks[0].lin.output[:] = 0
                    model.blocks[2].output = torch.full((2, 8), float(number))
                    edited = model.output
                assert not torch.equal(edited, expected)
        finally:
            stop.set()

    together([edit, call_plainly, call_plainly])
    assert calls


def test_a_plain_call_while_a_trace_of_another_thread_stands_still(net):
    model = NNsight(net)
    x = inputs(1)[0]
    expected = net(x)
    with model.trace(x):
        model.blocks[1].lin.output = torch.zeros(2, 8)
        (elsewhere,) = together([lambda: net(x)])
        here = net(x)
        edited = model.output
    assert torch.equal(elsewhere, expected)
    assert torch.equal(here, expected)
    assert not torch.equal(edited, expected)


def test_modules_called_in_the_body_are_not_taken_for_the_forward(net):
    model = NNsight(net)
    x = inputs(1)[0]
    with torch.no_grad():
        expected = net.blocks[2].lin(net.blocks[1](net.blocks[0](x)))
        with model.trace(x):
            hidden = model.blocks[0].output
            model.blocks[2].lin(hidden)
            model.blocks[2](hidden * 2)
            model(hidden)
            found = model.blocks[2].lin.output
    assert torch.equal(found, expected)


def test_a_value_is_out_of_reach_of_another_thread(net):
    model = NNsight(net)
    x = inputs(1)[0]
    with model.trace(x):
        model.blocks[0].output
        with pytest.raises(ValueError, match="no trace of this model is running here"):
            together([lambda: model.blocks[1].output])


def alive_greenlets():
    return [g for g in gc.get_objects() if issubclass(type(g), greenlet.greenlet) and not g.dead]


def test_threads_that_end_leave_no_coroutine(net):
    model = NNsight(net)
    x = inputs(1)[0]
    gc.collect()
    before = len(alive_greenlets())
    together([lambda n=n: trace(model, x, n) for n in range(THREADS)])
    for _ in range(50):  # a thread is gone a moment after it was joined
        greenlet.getcurrent()
        gc.collect()
        if len(alive_greenlets()) <= before:
            break
        time.sleep(0.02)
    assert len(alive_greenlets()) <= before
