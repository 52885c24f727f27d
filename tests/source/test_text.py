"""The text of a function is what it runs, or it is refused."""

import importlib
import inspect
import types

import pytest

from nnsight.errors import SourceError
from nnsight.source import _text, analyse, instrument


def functions_of(module):
    for value in list(vars(module).values()):
        members = vars(value).values() if inspect.isclass(value) else [value]
        for member in members:
            if isinstance(member, types.FunctionType) and member.__code__.co_filename == module.__file__:
                yield member


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.functional",
        "torch.nn.modules.activation",
        "torch.nn.modules.rnn",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "transformers.models.mixtral.modeling_mixtral",
        "accelerate.hooks",
    ],
)
def test_every_function_of_a_real_file_is_read_back_exactly(name):
    module = importlib.import_module(name)
    read = [_text.read(function) for function in functions_of(module) if "<" not in function.__name__]
    assert len(read) > 10


FUTURE = """\
from __future__ import annotations

def function(x: Missing):
    def inner(y: Other): return abs(y)
    return inner
"""
GLOBALS = """\
class C:
    def run(self, x):
        return C, scaffold(x)

def scaffold(x):
    return C, run(x)

def run(x):
    return abs(x)
"""


def load(path, text, name="function"):
    path.write_text(text)
    scope = {"__name__": "loaded"}
    exec(compile(text, str(path), "exec"), scope)
    return scope[name]


@pytest.mark.parametrize("changed", ["x - abs(1)", "x + abs(2)", "x + len(1)", "y + abs(1)"])
def test_a_file_edited_since_is_refused(tmp_path, changed):
    path = tmp_path / "module.py"
    function = load(path, "def function(x, y=0):\n    return x + abs(1)\n")
    path.write_text(f"def function(x, y=0):\n    return {changed}\n")
    with pytest.raises(SourceError, match=r"function does not run what .*module.py says at line 1"):
        analyse(function)


def test_a_function_that_moved_away_is_refused(tmp_path):
    path = tmp_path / "module.py"
    function = load(path, "def function(x):\n    return abs(x)\n")
    path.write_text("x = 1\n")
    with pytest.raises(SourceError, match="no definition of it at line 1"):
        analyse(function)


def test_a_file_loaded_again_is_read_again(tmp_path):
    path = tmp_path / "module.py"
    first = load(path, "def function(x):\n    return abs(x)\n")
    assert list(analyse(first).operations) == ["abs_0"]
    second = load(path, "def function(x):\n    return round(len([x]))\n")
    assert list(analyse(second).operations) == ["len_0", "round_0"]


def test_code_without_a_file_is_refused():
    scope = {}
    exec("def made(x):\n    return abs(x)\n", scope)
    with pytest.raises(SourceError, match="made has no Python source that can be read"):
        analyse(scope["made"])


def test_future_annotations_of_the_file_are_kept(tmp_path):
    function = load(tmp_path / "module.py", FUTURE)
    inner = instrument(function, lambda name, f, args, kwargs: f(*args, **kwargs))(1)
    assert inner.__annotations__ == {"y": "Other"}


def test_global_names_stay_global(tmp_path):
    cls = load(tmp_path / "module.py", GLOBALS, "C")

    def plain(name, f, args, kwargs):
        return f(*args, **kwargs)

    assert instrument(cls().run, plain)(-1) == (cls, (cls, 1))
    assert instrument(cls.run.__globals__["scaffold"], plain)(-2) == (cls, 2)


def test_assertions_rewritten_by_pytest_are_read():
    def function(x):
        assert abs(x), "not zero"
        return round(x)

    assert list(analyse(function).operations) == ["abs_0", "round_0"]
