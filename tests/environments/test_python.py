"""The body of a trace is ordinary code of the frame it stands in: wherever and however it is written."""

import asyncio
import contextlib
import sys
import warnings

import pytest
import torch
from torch.nn import Linear, ReLU, Sequential

from nnsight import NNsight, save


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Sequential(Linear(4, 4), ReLU(), Linear(4, 2))


@pytest.fixture
def model(net):
    return NNsight(net)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 4)


class TestForms:
    # fmt: off
    def test_one_line(self, net, model, x):
        with model.trace(x): hidden = model[0].output.save()  # noqa: E701
        assert torch.equal(hidden, net[0](x))

    def test_one_line_of_several_statements(self, net, model, x):
        with model.trace(x) as tracer: a = model[0].output; b = model[1].output; c = tracer.result  # noqa: E701, E702
        assert torch.equal(a, net[0](x))
        assert torch.equal(b, net[:2](x))
        assert torch.equal(c, net(x))

    def test_several_items(self, net, model, x):
        with torch.no_grad(), model.trace(x), torch.enable_grad(): hidden = model[0].output  # noqa: E701
        assert not hidden.requires_grad
    # fmt: on

    def test_body_that_begins_with_try(self, net, model, x):
        with model.trace(x):
            try:
                hidden = model[0].output
                raise KeyError
            except KeyError:
                later = model[1].output
            finally:
                out = model.output
        assert torch.equal(hidden, net[0](x))
        assert torch.equal(later, net[:2](x))
        assert torch.equal(out, net(x))

    def test_body_that_begins_with_a_loop(self, net, model, x):
        found = []
        with model.trace(x):
            for envoy in model:
                found.append(envoy.output)
                if len(found) == 2:
                    break
            else:
                raise AssertionError
        assert torch.equal(found[1], net[:2](x))

    def test_body_that_begins_with_a_docstring_a_def_or_a_lambda(self, net, model, x):
        with model.trace(x):
            """Not code."""

            def double(value):
                return value * 2

            hidden = (lambda: double(model[0].output))()
        assert torch.equal(hidden, net[0](x) * 2)

    def test_return_break_and_continue(self, net, model, x):
        def inside():
            with model.trace(x):
                return model[0].output
            raise AssertionError

        assert torch.equal(inside(), net[0](x))
        for number in range(3):
            with model.trace(x):
                model[0].output
                if number == 0:
                    continue
                break
        assert number == 1
        assert "forward" not in vars(net)

    def test_comprehensions(self, net, model, x):
        with model.trace(x):
            found = {i: envoy.output.sum() for i, envoy in enumerate(model)}
        assert [torch.equal(found[i], net[: i + 1](x).sum()) for i in range(3)] == [True] * 3

    def test_match_walrus_and_global(self, net, model, x):
        global seen_globally
        with model.trace(x):
            match model[0].output:
                case torch.Tensor() as seen_globally if (size := seen_globally.shape[0]) == 3:
                    pass
        assert torch.equal(seen_globally, net[0](x))
        assert size == 3

    def test_nonlocal(self, net, model, x):
        hidden = None

        def inside():
            nonlocal hidden
            with model.trace(x):
                hidden = model[0].output

        inside()
        assert torch.equal(hidden, net[0](x))

    def test_class_scope(self, net, model, x):
        class Found:
            with model.trace(x):
                hidden = model[0].output
                shape = tuple(hidden.shape)
            double = hidden * 2

        assert torch.equal(Found.double, net[0](x) * 2)
        assert Found.shape == (3, 4)

    def test_exit_stack_and_names_from_elsewhere(self, net, model, x):
        from contextlib import ExitStack, contextmanager

        @contextmanager
        def reading(model, x):
            with model.trace(x) as tracer:
                yield tracer

        with ExitStack() as stack:
            stack.enter_context(reading(model, x))
            hidden = model[0].output
            model[1].output = torch.zeros(3, 4)
            out = model.output
        assert torch.equal(hidden, net[0](x))
        assert torch.equal(out, net[2](torch.zeros(3, 4)))

    def test_manual_enter_and_exit(self, net, model, x):
        tracer = model.trace(x)
        tracer.__enter__()
        hidden = model[0].output
        tracer.__exit__(None, None, None)
        assert torch.equal(hidden, net[0](x))
        with pytest.raises(ValueError, match="entered once"):
            tracer.__enter__()

    def test_recursion(self, net, model, x):
        def deep(levels):
            with model.trace(x):
                first = model[0].output
                below = deep(levels - 1) if levels else 0
                return first.sum() + model[1].output.sum() + below

        one = net[0](x).sum() + net[:2](x).sum()
        assert torch.allclose(deep(20), one * 21)

    def test_decorated_function(self, net, model, x):
        @torch.no_grad()
        def run():
            with model.trace(x):
                return model[0].output

        assert torch.equal(run(), net[0](x))
        assert not run().requires_grad


class TestGenerators:
    def test_values_are_yielded_from_the_body(self, net, model, x):
        def layers():
            with model.trace(x):
                for envoy in model:
                    yield envoy.output

        found = list(layers())
        assert [torch.equal(f, net[: i + 1](x)) for i, f in enumerate(found)] == [True] * 3

    def test_one_that_is_closed_early(self, net, model, x):
        def layers():
            with model.trace(x):
                for envoy in model:
                    yield envoy.output

        running = layers()
        next(running)
        running.close()
        assert all("forward" not in vars(module) for module in net.modules())
        with pytest.raises(ValueError, match="no trace of this model is running"):
            model[0].output

    def test_one_that_is_dropped(self, net, model, x):
        def layers():
            with model.trace(x):
                for envoy in model:
                    yield envoy.output

        running = layers()
        next(running)
        del running
        assert all("forward" not in vars(module) for module in net.modules())
        with pytest.raises(ValueError, match="no trace of this model is running"):
            model[0].output

    def test_two_in_turns(self, net, model, x):
        def layers(x):
            with model.trace(x):
                for envoy in model:
                    yield envoy.output

        pairs = list(zip(layers(x), layers(x + 1), strict=True))
        for i, (first, second) in enumerate(pairs):
            assert torch.equal(first, net[: i + 1](x))
            assert torch.equal(second, net[: i + 1](x + 1))
        with pytest.raises(ValueError, match="no trace of this model is running"):
            model[0].output

    def test_in_turns_with_the_body_around(self, net, model, x):
        def layers(x):
            with model.trace(x):
                for envoy in model:
                    yield envoy.output

        with model.trace(x + 1) as tracer:
            for i, inner in enumerate(layers(x)):
                outer = model[i].output
                assert torch.equal(inner, net[: i + 1](x))
                assert torch.equal(outer, net[: i + 1](x + 1))
            out = tracer.result
        assert torch.equal(out, net(x + 1))

    def test_ended_in_the_order_they_began(self, net, model, x):
        def layers(x):
            with model.trace(x):
                for envoy in model:
                    yield envoy.output

        first, second = layers(x), layers(x + 1)
        assert torch.equal(next(first), net[0](x))
        assert torch.equal(next(second), net[0](x + 1))
        first.close()
        assert torch.equal(next(second), net[:2](x + 1))
        second.close()
        with pytest.raises(ValueError, match="no trace of this model is running"):
            model[0].output

    @pytest.mark.parametrize("kind", ["function", "class", "stack"])
    def test_a_context_manager_inside_a_trace(self, net, model, x, kind):
        @contextlib.contextmanager
        def traced(x):
            with model.trace(x):
                yield

        class Traced:
            def __init__(self, x):
                self.trace = model.trace(x)

            def __enter__(self):
                return self.trace.__enter__()

            def __exit__(self, *error):
                return self.trace.__exit__(*error)

        def stacked(x):
            stack = contextlib.ExitStack()
            stack.enter_context(model.trace(x))
            return stack

        make = {"function": traced, "class": Traced, "stack": stacked}[kind]
        with model.trace(x):
            model[0].output
            with make(x + 1):
                inner = model[1].output
            outer = model[1].output
        assert torch.equal(inner, net[:2](x + 1))
        assert torch.equal(outer, net[:2](x))

    def test_sent_values(self, net, model, x):
        def replace():
            with model.trace(x):
                model[1].output = yield model[0].output
                yield model.output

        running = replace()
        value = next(running)
        assert torch.equal(running.send(value + 1), net[2](net[0](x) + 1))
        running.close()


class TestExec:
    SOURCE = """
with model.trace(x) as tracer:
    hidden = model[0].output.save()
    model[1].output[:] = 0
    out = tracer.result.save()
"""

    def check(self, names, net, x):
        assert torch.equal(names["hidden"], net[0](x))
        assert torch.equal(names["out"], net[2](torch.zeros(3, 4)))

    def test_string(self, net, model, x):
        names = {"model": model, "x": x}
        exec(self.SOURCE, names)
        self.check(names, net, x)

    def test_globals_and_locals(self, net, model, x):
        names = {}
        exec(self.SOURCE, {"model": model, "x": x}, names)
        self.check(names, net, x)

    def test_compiled_for_the_prompt(self, net, model, x):
        names = {"model": model, "x": x}
        exec(compile(self.SOURCE.strip() + "\n", "<stdin>", "single"), names)
        self.check(names, net, x)

    def test_eval_in_the_body(self, net, model, x):
        with model.trace(x):
            hidden = eval("model[0].output")
        assert torch.equal(hidden, net[0](x))

    def test_error_names_the_line_of_the_string(self, model, x):
        with pytest.raises(RuntimeError, match="line 4 of <string>"):
            exec("with model.trace(x):\n  model[2].output\n\n  model[0].output = x", {"model": model, "x": x})


class TestAsync:
    def test_two_tasks_that_take_turns(self, net, model, x):
        turns = []

        async def trace(name, value, steps):
            with model.trace(value):
                found = []
                for envoy in model:
                    found.append(envoy.output)
                    turns.append(name)
                    for _ in range(steps):
                        await asyncio.sleep(0)
                out = model.output
            return [*found, out]

        async def main():
            return await asyncio.gather(trace("a", x, 1), trace("b", x + 1, 2), trace("c", x + 2, 0))

        results = asyncio.run(main())
        assert turns != sorted(turns)
        for offset, found in enumerate(results):
            expected = [net[: i + 1](x + offset) for i in range(3)]
            assert all(torch.equal(a, b) for a, b in zip(found, [*expected, expected[-1]], strict=True))
        assert all("forward" not in vars(module) for module in net.modules())

    def test_edits_of_one_task_do_not_reach_another(self, net, model, x):
        async def trace(value):
            with model.trace(x):
                await asyncio.sleep(0)
                model[1].output[:] = value
                await asyncio.sleep(0)
                return model.output

        async def main():
            return await asyncio.gather(*(trace(float(value)) for value in range(5)))

        for value, out in enumerate(asyncio.run(main())):
            assert torch.equal(out, net[2](torch.full((3, 4), float(value))))

    def test_cancelled_task(self, net, model, x):
        async def trace():
            with model.trace(x):
                model[0].output
                await asyncio.sleep(60)

        async def main():
            task = asyncio.create_task(trace())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert all("forward" not in vars(module) for module in net.modules())

    def test_threads_of_asyncio(self, net, model, x):
        def trace(offset):
            with model.trace(x + offset):
                model[0].output
                return model.output

        async def main():
            return await asyncio.gather(*(asyncio.to_thread(trace, n) for n in range(4)))

        for offset, out in enumerate(asyncio.run(main())):
            assert torch.equal(out, net(x + offset))

    def test_async_generator(self, net, model, x):
        async def layers(value):
            with model.trace(value):
                for envoy in model:
                    await asyncio.sleep(0)
                    yield envoy.output

        async def main():
            return [found async for found in layers(x)]

        found = asyncio.run(main())
        assert torch.equal(found[1], net[:2](x))


class TestErrors:
    def test_traceback_has_the_users_lines_alone(self, model, x):
        with pytest.raises(ZeroDivisionError) as caught:
            with model.trace(x):
                model[0].output
                1 / 0
        assert [str(entry.path) for entry in caught.traceback] == [__file__]

    def test_traceback_of_an_error_in_the_model(self, model, x):
        with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
            with model.trace(x):
                model[0].output
                model[1].output = torch.zeros(3, 5)
                line = sys._getframe().f_lineno + 1
                model[2].output
        paths = [str(entry.path) for entry in caught.traceback]
        assert paths[0] == __file__
        assert caught.traceback[0].lineno + 1 == line
        assert not [path for path in paths if "nnsight" in path.rpartition("site-packages")[2].split("/")]
        assert paths[-1].endswith("linear.py")

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
    def test_error_in_the_model_tells_of_the_edit(self, model, x):
        with pytest.raises(RuntimeError) as caught:
            with model.trace(x):
                line = sys._getframe().f_lineno + 1
                model[1].output = torch.zeros(3, 5)
        assert f"line {line} of test_python.py assigned model.1.output" in "".join(caught.value.__notes__)

    def test_handled_in_the_body(self, net, model, x):
        with model.trace(x):
            try:
                model[0].output @ torch.ones(7, 7)
            except RuntimeError:
                found = model[1].output
        assert torch.equal(found, net[:2](x))

    def test_context_and_cause_are_kept(self, model, x):
        with pytest.raises(KeyError) as caught:
            with model.trace(x):
                try:
                    1 / 0
                except ZeroDivisionError as error:
                    raise KeyError("why") from error
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def test_warnings_of_the_model_pass_through(self, x):
        class Warns(torch.nn.Module):
            def forward(self, x):
                warnings.warn("from the model", stacklevel=1)
                return x

        model = NNsight(Sequential(Warns(), ReLU()))
        with pytest.warns(UserWarning, match="from the model"):
            with model.trace(x):
                model[1].output


class TestContext:
    def test_profiler_and_trace_function_are_left_alone(self, net, model, x):
        events = []

        def follow(frame, event, arg):
            if frame.f_code is body.__code__:
                events.append((event, frame.f_lineno - body.__code__.co_firstlineno))
            return follow

        def body():
            with model.trace(x):
                hidden = model[0].output
                more = hidden + 1
            return more + 1

        before = sys.gettrace()
        sys.settrace(follow)
        try:
            body()
            assert sys.gettrace() is follow
        finally:
            sys.settrace(before)
        lines = [line for event, line in events if event == "line"]
        assert lines[:3] == [1, 2, 3]
        assert lines[-1] == 4

    def test_locals_of_the_frame(self, model, x):
        with model.trace(x):
            hidden = model[0].output
            assert locals()["hidden"] is hidden
        assert locals()["hidden"] is hidden

    def test_save_is_the_value_itself(self, model, x):
        with model.trace(x):
            hidden = model[0].output
            assert hidden.save() is hidden
            assert save(hidden) is hidden

    def test_stack_depth_of_the_body_is_its_own(self, model, x):
        def depth():
            frame, count = sys._getframe(), 0
            while frame is not None:
                frame, count = frame.f_back, count + 1
            return count

        outside = depth()
        with model.trace(x):
            model[0].output
            assert depth() == outside
