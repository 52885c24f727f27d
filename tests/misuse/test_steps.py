"""Steps of a generation asked for backwards, twice, beyond the end, or not at all."""

import pytest
import torch

from nnsight.errors import CaptureError, GradientError, InputError, IterationWarning, NeverRanError, OrderError

pytestmark = pytest.mark.timeout(10, func_only=True)

FORMS = r"`for step in tracer\.iter\[2:5\]`, \[3\], \[\[0, 2\]\], or \[:\] for every step"


@pytest.fixture
def generate(lm):
    return lambda steps=3: lm.generate([[1, 2]], max_new_tokens=steps)


@pytest.mark.parametrize("form", ["for", "with"])
@pytest.mark.parametrize(
    "bounds", [slice(None, None, -1), -1, slice(-2, None), slice(0, -1), [0, -1], slice(None, None, 0)], ids=repr
)
def test_backwards(lm, generate, refused, bounds, form):
    with refused(InputError, "counts steps from 0 upwards.*keep the values of the last steps"):
        with generate() as tracer:
            if form == "for":
                for _ in tracer.iter[bounds]:
                    lm.output
            else:
                with tracer.iter[bounds]:
                    lm.output


@pytest.mark.parametrize("bounds", ["a", 1.5, None, slice("a", None), [0, "1"], {}.keys, torch.ones(2)], ids=repr)
def test_no_steps(lm, generate, refused, bounds):
    with refused(InputError, FORMS):
        with generate() as tracer:
            for _ in tracer.iter[bounds]:
                lm.output


@pytest.mark.parametrize("form", ["for", "with"])
def test_without_brackets(lm, generate, refused, form):
    with refused(InputError, FORMS):
        with generate() as tracer:
            if form == "for":
                for _ in tracer.iter:
                    lm.output
            else:
                with tracer.iter:
                    lm.output


@pytest.mark.parametrize("bounds", [torch.tensor(1), range(1, 3), {2, 1}, (2, 1, 1), [], True])
def test_what_counts_as_steps(lm, generate, bounds):
    expected = {"tensor(1)": [1], "[]": [], "True": [1]}.get(repr(bounds), [1, 2])
    with generate() as tracer:
        seen = []
        for step in tracer.iter[bounds]:
            seen.append(step)
            lm.lm_head.output
    assert seen == expected


@pytest.mark.parametrize("how", ["after a later one", "a second loop", "a loop in a loop", "a block in a loop"])
def test_steps_that_have_passed(lm, generate, refused, how):
    with refused(
        OrderError, r"Step \d of the generation has passed: the model is in step 2\. Ask for steps in ascending"
    ):
        with generate() as tracer:
            if how == "after a later one":
                for _ in tracer.iter[2]:
                    lm.lm_head.output
                for _ in tracer.iter[0]:
                    lm.lm_head.output
            elif how == "a second loop":
                for _ in tracer.iter[:]:
                    lm.lm_head.output
                for _ in tracer.iter[:]:
                    lm.lm_head.output
            elif how == "a loop in a loop":
                for _ in tracer.iter[:]:
                    for _ in tracer.iter[:]:
                        lm.lm_head.output
            else:
                for _ in tracer.iter[:]:
                    with tracer.iter[:]:
                        lm.lm_head.output


@pytest.mark.parametrize("form", ["for", "with"])
def test_more_steps_than_there_are(lm, generate, form):
    with pytest.warns(IterationWarning, match="to reach step 3, but the generation ended before it"):
        with generate() as tracer:
            seen = []
            if form == "for":
                for step in tracer.iter[1:7]:
                    seen.append(step)
                    lm.lm_head.output
            else:
                with tracer.iter[1:7] as step:
                    seen.append(step)
                    lm.lm_head.output
            seen.append("after")
    assert seen == [1, 2, "after"]


def test_steps_of_a_single_forward(model, x):
    with model.trace(x) as tracer:
        seen = []
        for step in tracer.iter[:]:
            seen.append(step)
            hidden = model.first.output
    assert seen == [0]
    assert torch.equal(hidden, model.first(x))
    with pytest.warns(IterationWarning):
        with model.trace(x) as tracer:
            for _ in tracer.iter[1]:
                raise AssertionError("there is one step")


@pytest.mark.parametrize("count", [0, -1, "2", 1.5, None])
def test_next_by_no_number_of_steps(lm, model, x, generate, refused, count):
    with refused(InputError, r"steps are counted forwards, by at least one"):
        with generate() as tracer:
            tracer.next(count)
    with refused(InputError, r"model\.first\.next\(.*\): calls are counted forwards, by at least one"):
        with model.trace(x):
            model.first.next(count)


def test_next_beyond_the_end(lm, generate, refused):
    with refused(NeverRanError, r"in step 7, but the model has run 3 steps only.*for step in tracer\.iter\[:\]"):
        with generate() as tracer:
            tracer.next(7)
            lm.output


def test_a_trace_in_a_loop_over_steps(lm, generate):
    with lm.trace([[3]]):
        expected = lm.lm_head.output
    with generate() as tracer:
        inner, outer = [], []
        for _ in tracer.iter[:]:
            with lm.trace([[3]]):
                inner.append(lm.lm_head.output)
            outer.append(lm.lm_head.output)
    assert all(torch.equal(value, expected) for value in inner)
    assert len(outer) == 3


def test_statements_that_would_leave_a_block(lm, generate, refused):
    def returns(tracer):
        with tracer.iter[:] as step:
            return step

    with refused(CaptureError, "`return` would leave a with-block.*put the `return` after the block"):
        with generate() as tracer:
            returns(tracer)


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_error_in_a_step(lm, generate, refused, kind):
    with refused(kind, "on purpose"):
        with generate() as tracer:
            with tracer.iter[:] as step:
                lm.lm_head.output
                if step == 1:
                    raise kind("on purpose")


def test_a_loop_that_is_left_early(lm, generate):
    with generate() as tracer:
        for step in tracer.iter[:]:
            lm.lm_head.output
            if step == 1:
                break
        result = tracer.result
    assert step == 1
    assert result.shape == (1, 5)


def test_backward_in_a_generation(lm, generate, refused):
    with refused(GradientError, r"as `generate` of transformers does: use trace\(\)"):
        with generate() as tracer:
            for _ in tracer.iter[:]:
                lm.lm_head.output.sum().backward()


@pytest.mark.parametrize("count", [0, -1])
def test_no_new_tokens_is_the_models_own_error(lm, count):
    with pytest.raises(ValueError, match="max_new_tokens"):
        with lm.generate([[1, 2]], max_new_tokens=count):
            lm.output
