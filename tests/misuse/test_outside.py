"""Values asked for where no trace is open, and traces that are not used as traces."""

import pytest
import torch

from nnsight.errors import EditError, InputError, NoInputError, NotTracingError, UnknownPathError

pytestmark = pytest.mark.timeout(10, func_only=True)

OPEN_A_TRACE = r"no trace of this model is running here.*with model\.trace\(input\)"


@pytest.mark.parametrize(
    "ask",
    [
        lambda envoy, x: envoy.output,
        lambda envoy, x: envoy.input,
        lambda envoy, x: envoy.inputs,
        lambda envoy, x: setattr(envoy, "output", x),
        lambda envoy, x: setattr(envoy, "input", x),
        lambda envoy, x: setattr(envoy, "inputs", ((x,), {})),
        lambda envoy, x: envoy.skip(x),
        lambda envoy, x: envoy.next(),
    ],
    ids=["output", "input", "inputs", "set output", "set input", "set inputs", "skip", "next"],
)
@pytest.mark.parametrize("when", ["before", "after", "in a session", "in another model's", "of an operation"])
def test_values(model, lm, x, refused, ask, when):
    place = model.source.self_first_0 if when == "of an operation" else model.first
    with refused(NotTracingError, OPEN_A_TRACE):
        if when == "in a session":
            with model.session():
                ask(place, x)
        elif when == "in another model's":
            with lm.trace([[1, 2]]):
                ask(place, x)
        else:
            if when == "after":
                with model.trace(x):
                    pass
            ask(place, x)


@pytest.mark.parametrize(
    "use",
    [
        lambda tracer, x: tracer.result,
        lambda tracer, x: tracer.stop(),
        lambda tracer, x: tracer.cache(),
        lambda tracer, x: tracer.invoke(x),
        lambda tracer, x: tracer.barrier(2),
        lambda tracer, x: tracer.next(),
        lambda tracer, x: list(tracer.iter[:]),
        lambda tracer, x: list(tracer.all()),
    ],
    ids=["result", "stop", "cache", "invoke", "barrier", "next", "iter", "all"],
)
@pytest.mark.parametrize("when", ["before", "after", "in another trace"])
def test_tracers(model, x, refused, use, when):
    tracer = model.trace(x)
    with refused(NotTracingError, r"inside the `with` block of its trace.*with model\.trace\(input\) as tracer:"):
        if when != "before":
            with tracer:
                pass
        if when == "in another trace":
            with model.trace(x):
                use(tracer, x)
        else:
            use(tracer, x)


def test_a_loop_kept_beyond_the_trace(lm, refused):
    with lm.generate([[1, 2]], max_new_tokens=3) as tracer:
        steps = iter(tracer.iter[:])
        next(steps)
        lm.output
    with refused(NotTracingError, "loop over its steps inside its `with` block"):
        next(steps)


def test_a_barrier_kept_beyond_the_trace(model, x, refused):
    with model.trace(x) as tracer:
        barrier = tracer.barrier(1)
        barrier()
    with refused(NotTracingError, r"barrier = tracer\.barrier\(n\)"):
        barrier()
    with refused(NotTracingError, r"barrier = tracer\.barrier\(n\)"):
        with model.trace(x):
            barrier()


def test_a_function_of_an_invoke_called_later(model, x, refused):
    with model.trace() as tracer:
        with tracer.invoke(x):
            read = lambda: model.first.output  # noqa: E731
    with refused(NotTracingError, OPEN_A_TRACE):
        read()


def test_entered_twice(model, x, refused):
    again = r"call model\.trace\(\.\.\.\) again"
    tracer = model.trace(x)
    with tracer:
        with refused(NotTracingError, again):
            with tracer:
                pass
        hidden = model.first.output
    assert torch.equal(hidden, model.first(x))
    with refused(NotTracingError, again):
        with tracer:
            pass
    session = model.session()
    with session:
        pass
    with refused(NotTracingError, r"call model\.session\(\) again"):
        with session:
            pass


def test_left_without_having_been_entered(model, x, refused):
    tracer = model.trace(x)
    with refused(NotTracingError, r"enter it with `with model\.trace"):
        tracer.__exit__(None, None, None)
    with tracer:
        pass
    with refused(NotTracingError, r"enter it with `with model\.trace"):
        tracer.__exit__(None, None, None)


@pytest.mark.parametrize("way", ["read", "nothing", "whole batch", "generate", "plain"])
def test_no_input(model, lm, refused, way):
    with refused(NoInputError, r"with model\.trace\(input\).*with tracer\.invoke\(input\)"):
        if way == "read":
            with model.trace():
                model.first.output
        elif way == "nothing":
            with model.trace():
                pass
        elif way == "whole batch":
            with model.trace() as tracer:
                with tracer.invoke():
                    model.first.output
        elif way == "generate":
            with lm.generate(max_new_tokens=1):
                lm.output
        else:
            model.trace(trace=False)


@pytest.mark.parametrize("given", [3.5, [], None, {"no": 1}, object()], ids=repr)
def test_no_text(lm, refused, given):
    with refused(InputError, "Give it text, a list of texts, chat messages|An encoding needs input_ids"):
        with lm.trace(given):
            lm.output


def test_what_the_model_itself_refuses_is_its_own_error(model, x):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        with model.trace(torch.ones(1, 7)):
            model.last.output
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        with model.trace(x, foo=1):
            model.last.output


def test_generating_with_a_model_that_cannot(model, x, refused):
    with refused(UnknownPathError, "model .* has no 'generate'.*Its submodules are: first, middle, unused, last"):
        model.generate(x)


@pytest.mark.parametrize("name", ["frist", "last.weigth", "middle.7", ""])
def test_names_that_the_model_does_not_have(model, refused, name):
    with refused(UnknownPathError, "has no|The closest|submodules"):
        model.get(name) if name else model.nothing


def test_an_index_that_the_model_does_not_have(model, refused):
    with refused(IndexError, r"model\.middle has 2 submodules; there is none at index 7"):
        model.middle[7]


def test_attributes_assigned_by_mistake(model, net, x, refused):
    with model.trace(x):
        with refused(UnknownPathError, r"model\.first .* has no 'outptu'. The closest are: output"):
            model.first.outptu = x
        with refused(EditError, r"model\.last\.output = \.\.\., or to its \.input"):
            model.last = x
        with refused(TypeError, "cannot assign .* as parameter 'weight'"):
            model.last.weight = x
    model.note = 3
    assert model.note == 3
    old = net.last.weight
    model.last.weight = torch.nn.Parameter(torch.zeros(2, 4))
    assert not net.last.weight.any()
    net.last.weight = old
