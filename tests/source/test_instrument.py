"""An instrumented function does what the function does, and a dispatch makes its calls."""

import asyncio
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nnsight.errors import SourceError
from nnsight.source import _function, analyse, instrument

SCALE = 3


def plain(name, f, args, kwargs):
    return f(*args, **kwargs)


def test_dispatch_gets_the_callee_and_its_arguments():
    def function(f, *rest, **named):
        return f(1, *rest, a=2, **named)

    seen = []

    def dispatch(*call):
        seen.append(call)
        return "instead"

    assert instrument(function, dispatch)(max, 5, 6, key=abs) == "instead"
    assert seen == [("f_0", max, (1, 5, 6), {"a": 2, "key": abs})]


def test_replacing_a_result_changes_the_outcome():
    layer = torch.nn.Linear(3, 3)
    x = torch.ones(2, 3)
    instead = torch.zeros(2, 3)
    routed = instrument(layer, lambda name, f, args, kwargs: instead)
    assert routed(x) is instead
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_a_repeated_keyword_is_refused_as_in_a_call():
    def function(f, named):
        return f(a=1, **named)

    with pytest.raises(TypeError, match="multiple values for keyword argument 'a'"):
        instrument(function, plain)(dict, {"a": 2})
    assert instrument(function, plain)(dict, {"b": 2}) == {"a": 1, "b": 2}


def test_signature_and_attributes_are_those_of_the_function():
    def function(a: int, b: str = "b", *, c: float = 0.5) -> str:
        """Says it."""
        return str(a) + b + str(c)

    function.mark = "kept"
    copy = instrument(function, plain)
    for attribute in ("__name__", "__qualname__", "__doc__", "__module__", "__defaults__", "__kwdefaults__"):
        assert getattr(copy, attribute) == getattr(function, attribute)
    assert copy.__annotations__ == function.__annotations__
    assert copy.mark == "kept"
    assert copy.__globals__ is function.__globals__
    assert copy.__code__.co_varnames == function.__code__.co_varnames
    assert copy.__code__.co_filename == function.__code__.co_filename
    assert copy(1) == function(1) == "1b0.5"


def test_closure_cells_are_shared():
    count = 0

    def function():
        nonlocal count
        count += abs(SCALE)
        return (lambda: count)()

    copy = instrument(function, plain)
    assert copy() == 3
    count = 10
    assert (copy(), function(), count) == (13, 16, 16)


def test_a_function_may_call_itself(recorder):
    def factorial(n):
        return n * factorial(n - 1) if n else 1

    record = recorder()
    assert instrument(factorial, record)(5) == 120
    assert record.names == ["factorial_0"]  # the inner calls are of the function itself


def test_super_class_and_private_names_mean_what_they_did(recorder):
    class Base:
        def run(self, x):
            return [type(self).__name__, x]

    class Derived(Base):
        def __secret(self, x):
            return x + 1

        def run(self, x):
            return [*super().run(self.__secret(x)), __class__.__name__]

    record = recorder()
    thing = Derived()
    assert instrument(thing.run, record)(1) == thing.run(1) == ["Derived", 2, "Derived"]
    assert record.names == ["self___secret_0", "super_run_0"]
    assert instrument(Derived.run, record)(thing, 2) == thing.run(2)


def test_generators_and_coroutines():
    def numbers(n):
        for i in range(n):
            yield abs(i)

    async def later(x):
        return await asyncio.sleep(0, result=[abs(y) for y in x])

    assert list(instrument(numbers, plain)(3)) == [0, 1, 2]
    assert asyncio.run(instrument(later, plain)([-1, 2])) == [1, 2]


def test_locals_has_the_functions_names_only():
    def function(a):
        b = abs(a)
        return locals(), vars(), [b for _ in range(1)]

    assert instrument(function, plain)(-2) == function(-2)


def test_nested_functions_keep_their_names():
    def function():
        def inner():
            return abs(1)

        return [inner.__qualname__, (lambda: abs(2)).__qualname__], abs(3)

    assert instrument(function, plain)() == function()


def test_a_traceback_has_the_files_own_lines():
    def fails(x):
        y = abs(x)

        return y / (
            x - x
        )  # fmt: skip

    def frames(function):
        with pytest.raises(ZeroDivisionError) as raised:
            function(1)
        last = traceback.extract_tb(raised.value.__traceback__)[-1]
        return last.filename, last.lineno, last.name, last.line

    assert frames(instrument(fails, plain)) == frames(fails)


def test_nothing_is_changed():
    layer = torch.nn.MultiheadAttention(8, 2)
    function = type(layer).forward
    before = dict(vars(layer)), set(function.__globals__), function.__code__
    x = torch.randn(3, 1, 8)
    instrument(layer, plain)(x, x, x)
    assert (dict(vars(layer)), set(function.__globals__), function.__code__) == before


def test_two_dispatches_do_not_meet():
    def function(f):
        return f()

    ones = instrument(function, lambda *call: 1)
    twos = instrument(function, lambda *call: 2)
    assert (ones(int), twos(int), ones(int), function(int)) == (1, 2, 1, 0)


def test_into_a_called_function():
    def inner(x):
        return abs(x) + 1

    def outer(x):
        return inner(x) * 2

    inside = instrument(inner, lambda name, f, args, kwargs: 100)

    def dispatch(name, f, args, kwargs):
        assert f is inner
        assert list(analyse(f).operations) == ["abs_0"]
        return inside(*args, **kwargs)

    assert instrument(outer, dispatch)(-1) == 202


def test_code_is_compiled_once():
    def function(x):
        return abs(x)

    assert analyse(function) is analyse(function)
    assert instrument(function, plain).__code__ is instrument(function, plain).__code__


def test_the_memory_of_functions_is_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(_function, "LIMIT", 3)
    monkeypatch.setattr(_function, "_known", {})
    path = tmp_path / "many.py"
    path.write_text("".join(f"def f{i}(x):\n    return abs(x)\n" for i in range(8)))
    scope = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    for i in range(8):
        assert instrument(scope[f"f{i}"], plain)(-i) == i
        assert len(_function._known) <= 3
    assert [source.name for source in _function._known.values()] == ["f5", "f6", "f7"]


def test_threads_may_analyse_one_function():
    functions = [torch.nn.LayerNorm.forward, torch.nn.Dropout.forward, torch.nn.GELU.forward] * 20
    with ThreadPoolExecutor(8) as pool:
        sources = list(pool.map(analyse, functions))
    assert all(source is sources[i % 3] for i, source in enumerate(sources))


def test_equal_code_of_two_files_is_told_apart(tmp_path):
    functions = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.py"
        path.write_text("def same(x):\n    return abs(x)\n")
        scope = {}
        exec(compile(path.read_text(), str(path), "exec"), scope)
        functions.append(scope["same"])
    assert functions[0].__code__ == functions[1].__code__
    assert [analyse(f).file for f in functions] == [f.__code__.co_filename for f in functions]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (torch.matmul, "<built-in .*matmul> has no Python source; its inputs and output are still available"),
        (torch.ones(1).view, "<built-in .*view> has no Python source"),
        (len, "<built-in len> has no Python source"),
        (torch.nn.Linear, "Linear is a class"),
        (lambda x: x, "is a lambda; define it with `def`"),
        (3, "int.* has no Python source"),
    ],
)
def test_what_has_no_source_is_refused(function, message):
    with pytest.raises(SourceError, match=message):
        analyse(function)
    with pytest.raises(SourceError, match=message):
        instrument(function, plain)


def test_an_instrumented_function_is_not_instrumented_again():
    def function(x):
        return abs(x)

    with pytest.raises(SourceError, match="instrumented already"):
        instrument(instrument(function, plain), plain)
