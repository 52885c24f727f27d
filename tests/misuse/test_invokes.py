"""Invokes, the names they pass on, and barriers: what can never come is an error, never a wait without end."""

import contextlib
import threading

import pytest
import torch

from nnsight.errors import CaptureError, InputError, OutOfOrderError, WaitError

pytestmark = pytest.mark.timeout(10, func_only=True)

MEET = r"which {came} of {count} blocks reached\. Call it in each block that is to meet the others"


# --- names -------------------------------------------------------------------------------------------------


def test_two_blocks_that_wait_for_each_others_names(model, x, refused):
    with refused(
        WaitError, r"line \d+.* reads the name 'second', which only a later block binds.*Put that block first"
    ):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.first.output
                first = second  # noqa: F821
            with tracer.invoke(x):
                second = first


def test_a_name_that_only_a_later_block_binds(model, x, refused):
    with refused(WaitError, r"'later', which only a later block binds, the invoke at line \d+ of test_invokes.py"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.last.output = later  # noqa: F821
            with tracer.invoke(x):
                later = model.last.output


def test_a_name_that_a_block_did_not_bind_after_all(model, x, refused):
    with refused(WaitError, r"'hidden', which the invoke at line \d+.* was to bind.*Bind it there in any case"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                if x.sum() > 1e9:
                    hidden = model.first.output
            with tracer.invoke(x):
                model.last.output = hidden


def test_a_name_that_had_a_value_before_has_it_where_nobody_binds_it(model, x):
    kept = "before"
    with model.trace() as tracer:
        with tracer.invoke(x):
            if x.sum() > 1e9:
                kept = "never"
        with tracer.invoke(x):
            seen = kept
    assert seen == "before"


def test_a_name_waited_for_inside_backward(model, x, refused):
    with refused(WaitError, "'other', which only a later block binds"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                hidden = model.first.output
                with model.output.sum().backward(retain_graph=True):
                    hidden.grad, other  # noqa: F821
            with tracer.invoke(x):
                other = model.last.output


def test_a_value_that_came_too_late_for_the_place_it_was_for(model, x, refused):
    with refused(
        OutOfOrderError, r"model\.first\.output.*It had passed while the invoke at line \d+.* waited for 'late'"
    ):
        with model.trace() as tracer:
            with tracer.invoke(x):
                late = model.last.output
            with tracer.invoke(x):
                model.first.output[:] = late.sum()


def test_a_name_that_nobody_binds_is_pythons_own_error(model, x, refused):
    with refused(NameError, "'nowhere' is not defined"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.first.output = nowhere  # noqa: F821


# --- barriers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "calls", "came"), [(3, 2, 2), (2, 1, 1), (2, 3, 1), (5, 1, 1)])
def test_a_barrier_with_too_few_or_too_many_members(model, x, refused, count, calls, came):
    with refused(WaitError, rf"the invoke at line \d+.*barrier\({count}\), {MEET.format(came=came, count=count)}"):
        with model.trace() as tracer:
            barrier = tracer.barrier(count)
            for _ in range(calls):
                with tracer.invoke(x):
                    model.first.output
                    barrier()
            with tracer.invoke(x):
                model.last.output


def test_a_barrier_called_twice_by_one_block(model, x, refused):
    with refused(WaitError, MEET.format(came=1, count=2)):
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(x):
                barrier()
                barrier()
            with tracer.invoke(x):
                barrier()


def test_two_barriers_in_different_orders(model, x, refused):
    with refused(WaitError, MEET.format(came=1, count=2)):
        with model.trace() as tracer:
            one, other = tracer.barrier(2), tracer.barrier(2)
            with tracer.invoke(x):
                one()
                other()
            with tracer.invoke(x):
                other()
                one()


def test_a_barrier_of_the_body_alone(model, x, refused):
    with refused(WaitError, f"the body of the trace waits.*{MEET.format(came=1, count=2)}"):
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(x):
                model.first.output
            barrier()


def test_a_barrier_that_a_failing_block_never_reaches(model, x, refused):
    with refused(ZeroDivisionError, "division"):
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(x):
                barrier()
            with tracer.invoke(x):
                1 / 0
                barrier()


def test_a_barrier_inside_backward(model, x, refused):
    with refused(WaitError, MEET.format(came=1, count=2)):
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(x):
                hidden = model.first.output
                with model.output.sum().backward(retain_graph=True):
                    hidden.grad
                    barrier()
            with tracer.invoke(x):
                pass


def test_a_barrier_of_loops_of_different_lengths(lm, refused):
    with refused(WaitError, MEET.format(came=1, count=2)):
        with lm.generate(max_new_tokens=3) as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke([[1, 2]]):
                for _ in tracer.iter[:]:
                    barrier()
            with tracer.invoke([[3, 4]]):
                for _ in tracer.iter[:2]:
                    barrier()


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None])
def test_a_barrier_for_no_number_of_blocks(model, x, refused, count):
    with refused(InputError, r"a number of blocks, at least one: tracer\.barrier\(2\), not"):
        with model.trace(x) as tracer:
            tracer.barrier(count)


# --- where invokes stand -----------------------------------------------------------------------------------


def test_an_invoke_after_the_start(model, x, refused):
    with refused(InputError, r"the batch is complete\. Put every tracer\.invoke\(input\) before that line"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.first.output
            model.first.output
            with tracer.invoke(x):
                model.first.output


def test_an_invoke_made_before_the_start_and_entered_after_it(model, x, refused):
    with refused(InputError, r"the batch is complete\. Put every tracer\.invoke\(input\) before that line"):
        with model.trace(x) as tracer:
            invoke = tracer.invoke(x)
            model.first.output
            with invoke:
                model.first.output


def test_an_invoke_in_a_loop_over_steps(lm, refused):
    with refused(InputError, "the batch is complete"):
        with lm.generate([[1, 2]], max_new_tokens=2) as tracer:
            for _ in tracer.iter[:]:
                with tracer.invoke([[1, 2]]):
                    lm.output


@pytest.mark.parametrize("given", [True, False])
def test_an_invoke_inside_an_invoke(model, x, refused, given):
    with refused(InputError, r"cannot stand inside another block of the trace \(the invoke at line \d+.*side by side"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                with tracer.invoke(*[x] * given):
                    model.first.output


def test_an_invoke_that_is_not_entered(model, x, refused):
    with refused(InputError, r"at line \d+ of test_invokes.py does nothing by itself: write `with tracer\.invoke"):
        with model.trace(x) as tracer:
            tracer.invoke(x)
            model.first.output


def test_invokes_that_do_not_make_a_batch(model, x, refused):
    with refused(InputError, r"of shapes \[2, 4\], \[2, 5\], do not make one batch along dimension 0"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.first.output
            with tracer.invoke(torch.ones(2, 5)):
                pass
    with refused(InputError, r"give different values \(a tuple of 1, a tuple of 2\).*pass it to trace\(\) instead"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.first.output
            with tracer.invoke(x, x):
                pass
    with refused(InputError, r"must have the same first dimension"):
        with model.trace() as tracer:
            with tracer.invoke(x, torch.ones(3, 4)):
                model.first.output
            with tracer.invoke(x, torch.ones(3, 4)):
                pass


# --- blocks that cannot be taken from their source -----------------------------------------------------------


def test_statements_that_would_leave_a_block(model, x, refused):
    async def awaits(tracer):
        with tracer.invoke(x):
            await something()  # noqa: F821

    def yields(tracer):
        with tracer.invoke(x):
            yield model.first.output

    def returns(tracer):
        with tracer.invoke(x):
            return model.first.output

    def breaks(tracer):
        for _ in range(2):
            with tracer.invoke(x):
                break

    def continues(tracer):
        for _ in range(2):
            with tracer.invoke(x):
                continue

    def run(function, tracer):
        found = function(tracer)
        if function is awaits:
            found.send(None)
        elif function is yields:
            next(found)

    for function in (awaits, yields, returns, breaks, continues):
        word = function.__name__.removesuffix("s")
        with refused(CaptureError, rf"`{word}` would leave a with-block.*put the `{word}` after the block"):
            with model.trace() as tracer:
                run(function, tracer)


def test_blocks_not_entered_by_a_statement(model, x, refused):
    text = "must be entered by a `with` statement that stands in the code"
    with refused(CaptureError, text):
        with model.trace() as tracer, contextlib.ExitStack() as stack:
            stack.enter_context(tracer.invoke(x))
    with refused(CaptureError, text):
        with model.trace() as tracer:
            tracer.invoke(x).__enter__()


def test_blocks_without_source(model, x, refused):
    with refused(CaptureError, "source of this with-block is not available.*Put the code into a file"):
        exec(
            "with model.trace() as tracer:\n    with tracer.invoke(x):\n        model.first.output",
            {"model": model, "x": x},
        )


# --- errors in blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration])
def test_an_error_in_one_of_several_invokes(model, x, refused, which, kind):
    done = []

    def maybe(number):
        if number == which:
            raise kind("on purpose")

    with refused(kind, "on purpose"):
        with model.trace() as tracer:
            for number in range(3):
                with tracer.invoke(x):
                    try:
                        model.first.output
                        maybe(number)
                        model.last.output
                    finally:
                        done.append(number)
    assert sorted(done) == [0, 1, 2]


def test_an_error_that_is_swallowed_while_the_run_ends(model, x, refused):
    with refused(ZeroDivisionError, "division"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                with contextlib.suppress(BaseException):
                    model.last.output
                with contextlib.suppress(Exception):
                    model.last.output
            with tracer.invoke(x):
                model.first.output
                1 / 0


def test_a_model_that_fails_while_invokes_wait(model, net, x, refused):
    handle = net.middle.register_forward_hook(lambda module, args, output: 1 / 0)
    with refused(ZeroDivisionError, "division"):
        with model.trace() as tracer:
            for _ in range(2):
                with tracer.invoke(x):
                    model.last.output
    handle.remove()


def test_a_trace_of_the_same_model_in_an_invoke(model, x):
    with model.trace() as tracer:
        with tracer.invoke(x):
            with model.trace(x * 2):
                inner = model.first.output
            outer = model.first.output
        with tracer.invoke(x):
            other = model.first.output
    assert torch.equal(inner, model.first(x * 2))
    assert torch.allclose(outer, model.first(x))
    assert torch.allclose(other, outer)


def test_recursion_without_end(model, x, refused):
    def go():
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.first.output
                go()

    with refused(RecursionError, "maximum recursion depth"):
        go()


def test_a_thread_in_an_invoke(model, x):
    from nnsight.errors import NotTracingError

    errors = []

    def work():
        try:
            model.first.output
        except NotTracingError as error:
            errors.append(error)

    with model.trace() as tracer:
        with tracer.invoke(x):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert "no trace of this model is running here" in str(errors[0])
