"""How traces end: errors and exits in the body, models that go away, threads, tasks and generators."""

import asyncio
import contextvars
import copy
import gc
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from greenlet import GreenletExit

from nnsight import NNsight
from nnsight.errors import NotTracingError

pytestmark = pytest.mark.timeout(10, func_only=True)

NO_TRACE = "no trace of this model is running here"
OTHER_THREAD = "asked for in another thread than the one that opened the trace.*open a trace of its own in each thread"
KINDS = [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, GreenletExit]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before the model", "inside it", "at its end"])
def test_an_error_in_the_body(model, x, refused, kind, when):
    with refused(kind, "on purpose"):
        with model.trace(x):
            if when == "inside it":
                model.first.output
            elif when == "at its end":
                model.output
            raise kind("on purpose")


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_the_model(model, net, x, refused, kind):
    def fail(module, args, output):
        raise kind("on purpose")

    handle = net.middle.register_forward_hook(fail)
    with refused(kind, "on purpose"):
        with model.trace(x):
            model.first.output
    handle.remove()


def test_an_error_that_the_body_catches(model, net, x):
    with model.trace(x):
        try:
            1 / 0
        except ZeroDivisionError:
            hidden = model.first.output
    assert torch.equal(hidden, net.first(x))


# --- the model goes away, or changes -------------------------------------------------------------------------


def test_a_body_that_deletes_the_model(x):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    model, gone = NNsight(net), weakref.ref(net)
    with model.trace(x):
        hidden = model[0].output
        del model, net
        gc.collect()
    assert hidden.shape == (2, 4)
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("warm", [False, True])
def test_a_body_that_exchanges_a_module(x, warm):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    model = NNsight(net)
    if warm:
        with model.trace(x):
            pass
    with model.trace(x):
        model[0].output
        net[2] = torch.nn.Linear(4, 3)
        output = model[2].output
    assert torch.equal(output, net(x))
    assert output.shape == (2, 3)
    assert not any("forward" in vars(module) for module in net.modules())


def test_a_body_that_deletes_a_module(net, x):
    net = copy.deepcopy(net)
    model = NNsight(net)
    with model.trace(x):
        hidden = model.first.output
        del net.unused
        output = model.output
    assert torch.equal(hidden, net.first(x))
    assert torch.equal(output, net(x))
    assert not any("forward" in vars(module) for module in net.modules())


# --- threads -------------------------------------------------------------------------------------------------


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(5)


def test_a_thread_that_reads(model, x, refused):
    with model.trace(x) as tracer:
        with refused(NotTracingError, NO_TRACE):
            in_thread(lambda: model.first.output)
        with refused(NotTracingError, "in the thread of that block"):
            in_thread(lambda: tracer.result)


@pytest.mark.parametrize("started", [True, False])
def test_a_thread_that_takes_the_context_with_it(model, net, x, refused, started):
    with model.trace(x):
        if started:
            model.first.output
        with refused(NotTracingError, OTHER_THREAD):
            context = contextvars.copy_context()
            in_thread(lambda: context.run(lambda: model.last.output))
        output = model.last.output
    assert torch.equal(output, net(x))


def test_asyncio_to_thread(model, net, x, refused):
    async def main():
        with model.trace(x):
            with refused(NotTracingError, OTHER_THREAD):
                await asyncio.to_thread(lambda: model.first.output)
            return model.first.output

    assert torch.equal(asyncio.run(main()), net.first(x))


def test_a_trace_of_its_own_in_a_thread_of_the_body(model, net, x):
    def work():
        with model.trace(x * 2):
            return model.first.output

    with model.trace(x):
        inner = in_thread(work)
        hidden = model.first.output
    assert torch.equal(inner, net.first(x * 2))
    assert torch.equal(hidden, net.first(x))


# --- tasks -----------------------------------------------------------------------------------------------------


def test_a_task_that_reads_after_the_end(model, x, refused):
    async def read():
        await asyncio.sleep(0.01)
        return model.first.output

    async def main():
        with model.trace(x):
            task = asyncio.create_task(read())
        with refused(NotTracingError, NO_TRACE):
            await task

    asyncio.run(main())


def test_tasks_that_read_in_turns(model, net, x):
    async def read(place):
        await asyncio.sleep(0)
        return place.output

    async def main():
        with model.trace(x):
            return await asyncio.gather(read(model.first), read(model.middle), read(model.last))

    first, middle, last = asyncio.run(main())
    assert torch.equal(first, net.first(x))
    assert torch.equal(middle, net.middle(first))
    assert torch.equal(last, net(x))


# --- generators --------------------------------------------------------------------------------------------------


def reads(model, x):
    with model.trace(x):
        yield model.first.output
        yield model.last.output


def test_a_generator_that_is_never_resumed(model, net, x):
    before = dict(vars(net.last))
    suspended = reads(model, x)
    next(suspended)
    with model.trace(x * 2):
        hidden = model.first.output
    assert torch.equal(hidden, net.first(x * 2))
    assert torch.equal(net(x), net.last(net.middle(net.first(x))))
    del suspended
    gc.collect()
    assert vars(net.last) == before


def test_a_generator_that_another_thread_resumes(model, x, refused):
    suspended = reads(model, x)
    next(suspended)
    with refused(NotTracingError, NO_TRACE):
        in_thread(lambda: next(suspended))


def test_a_generator_that_another_thread_closes(model, x):
    suspended = reads(model, x)
    next(suspended)
    in_thread(suspended.close)


def test_a_generator_whose_thread_is_gone(model, x):
    def start():
        suspended = reads(model, x)
        next(suspended)
        return suspended

    suspended = in_thread(start)
    suspended.close()


def run_program(folder, text):
    program = folder / "program.py"
    program.write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": "", "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.timeout(90, func_only=True)
def test_a_program_that_ends_in_a_trace(tmp_path):
    done = run_program(
        tmp_path,
        """
        import torch, nnsight, sys
        model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()))
        def reads():
            with model.trace(torch.ones(1, 3)):
                yield model[0].output
        suspended = reads()
        next(suspended)
        print("done")
        with model.trace(torch.ones(1, 3)) as tracer:
            model[0].output
            sys.exit(3)
    """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "done\n", "")


@pytest.mark.timeout(90, func_only=True)
def test_a_program_that_is_interrupted_in_a_trace(tmp_path):
    done = run_program(
        tmp_path,
        """
        import signal, threading, os, torch, nnsight
        model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()))
        try:
            with model.trace() as tracer:
                for _ in range(2):
                    with tracer.invoke(torch.ones(1, 3)):
                        model[0].output
                        signal.raise_signal(signal.SIGINT)
                        model[1].output
        except KeyboardInterrupt:
            print("interrupted", [name for module in model._model.modules() for name in vars(module) if name == "forward"])
    """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted []\n", "")


# --- recursion -------------------------------------------------------------------------------------------------


@pytest.mark.timeout(90, func_only=True)
def test_recursion_without_end(model, x, refused):
    def go():
        with model.trace(x):
            model.first.output
            go()

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(400)
    try:
        with refused(RecursionError, "recursion"):
            go()
    finally:
        sys.setrecursionlimit(limit)


def test_the_model_itself_called_in_its_trace(model, net, x):
    with model.trace(x):
        hidden = model.first.output
        output = model(x)
        last = model.last.output
    assert torch.equal(output, net(x))
    assert torch.equal(last, output)
    assert torch.equal(hidden, net.first(x))


def test_many_threads_that_misuse_one_model(model, net, x):
    """Errors in one thread leave the traces of others alone."""
    expected, failures = net(x), []

    def work(number):
        try:
            for _ in range(10):
                if number % 2:
                    with model.trace(x):
                        model.first.output
                        output = model.output
                    assert torch.equal(output, expected)
                else:
                    with pytest.raises(ZeroDivisionError), model.trace(x):
                        model.middle.output
                        1 / 0
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(8)
    assert not failures


def test_a_trace_of_the_same_model_in_a_trace(model, net, x):
    """Each tracer answers for its own trace; the model's places belong to the inner one while it is open."""
    with model.trace(x) as outer:
        first = model.first.output
        with model.trace(x * 2) as inner:
            within = model.first.output
            inner_result = inner.result
            outer_result = outer.result
        last = outer.result
    assert torch.equal(first, net.first(x))
    assert torch.equal(within, net.first(x * 2))
    assert torch.equal(inner_result, net(x * 2))
    assert torch.equal(outer_result, net(x))
    assert torch.equal(last, outer_result)
