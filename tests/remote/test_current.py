"""What travels is what runs here: a file that was changed after it was loaded is not sent in its place."""

import importlib
import itertools
import linecache
import os
from types import FunctionType

import pytest

from nnsight.errors import TravelError
from nnsight.remote._code import source_of

NUMBERS = itertools.count()
# A definition named `made`, and something in its text that is changed on disk.
CHANGES = {
    "an operator": ("def made(x):\n    return x + 1", "x + 1", "x - 1"),
    "the order of operands": ("def made(x, y):\n    return x - y", "x - y", "y - x"),
    "constants that change places": ("def made(x):\n    return 2 * x + 3 * x", "2 * x + 3 * x", "3 * x + 2 * x"),
    "the sign of nothing": ("def made(x):\n    return x * 0.0", "0.0", "-0.0"),
    "a comparison": ("def made(x):\n    return x < 1", "x < 1", "x > 1"),
    "a loop within": ("def made(x):\n    return [a + 1 for a in x]", "a + 1", "a - 1"),
    "a function within": ("def made(x):\n    def inner(y):\n        return y * x\n    return inner", "y * x", "y / x"),
    "a lambda": ("made = lambda x: x + 1", "x + 1", "x - 1"),
    "a closure": (
        "def around(y):\n    def made(x):\n        return x + y\n    return made\nmade = around(2)",
        "x + y",
        "x - y",
    ),
    "a method": ("class made:\n    def run(self, x):\n        return x + 1", "x + 1", "x - 1"),
    "a method that asks its base": (
        "class made(dict):\n    def run(self, x):\n        return super().get(x) + 1",
        "get(x) + 1",
        "get(x) - 1",
    ),
    "a call of what is imported": (
        "import math\n\ndef made(x):\n    return math.floor(x) + x.real",
        "math.floor",
        "math.ceil",
    ),
    "a lambda that calls what is imported": (
        "if True:\n    import math as m\nmade = lambda x: x.conjugate(m.floor(1))",
        "m.floor",
        "m.ceil",
    ),
    "a method that calls what is imported": (
        "import math\nfrom math import pi\nclass made:\n    def run(self, x):\n"
        "        return [math.floor(a) + pi.real for a in x.items()]",
        "math.floor",
        "math.ceil",
    ),
    "a text of several lines": (
        "def around():\n    def made():\n        return '''one\n          two\n    three'''\n    return made\nmade = around()",
        "two",
        "2",
    ),
    "slots": (
        "class made:\n    __slots__ = ('x', '_y')\n    def run(self):\n        return self.x + 1",
        "x + 1",
        "x - 1",
    ),
    "a method that asks its base by name": (
        "class made(dict):\n    def run(self, x):\n        return super(made, self).get(x) + 1",
        "get(x) + 1",
        "get(x) - 1",
    ),
    "a class whose base wraps its methods": (
        "from functools import wraps\nclass Base:\n    def __init_subclass__(cls):\n"
        "        run = cls.run\n        cls.run = wraps(run)(lambda *x: run(*x))\n"
        "class made(Base):\n    def run(self, x):\n        return x + 1",
        "x + 1",
        "x - 1",
    ),
    "a closure over a namesake of what is imported": (
        "import math\ndef around(math):\n    def made(x):\n        return math.floor(x)\n    return made\n"
        "made = around(math)",
        "math.floor",
        "math.ceil",
    ),
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a text as a module, and gives what is called `made` there and the module's file."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(text):
        name = f"loaded_{next(NUMBERS)}"
        file = tmp_path / f"{name}.py"
        file.write_text(f"{text}\n")
        return importlib.import_module(name).made, file

    return load


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_on_disk_is_sent(load, what):
    made, file = load(CHANGES[what][0])
    source = source_of(made)
    assert source.filename == str(file)
    assert CHANGES[what][1] in source.text


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_no_longer_what_runs_is_refused(load, what):
    text, old, new = CHANGES[what]
    made, file = load(text)
    assert text.count(old) == 1
    changed = f"{text.replace(old, new)}\n"
    file.write_text(changed)
    later = file.stat().st_mtime + 10  # of the same size, perhaps within the clock's tick
    os.utime(file, (later, later))
    linecache.checkcache(str(file))
    with pytest.raises(TravelError, match="changed since it was loaded"):
        source_of(made)


def test_a_text_of_several_lines_keeps_its_margin(load):
    made, _ = load(CHANGES["a text of several lines"][0])
    namespace = {}
    exec(source_of(made).text, namespace)
    assert namespace["made"]() == made() == "one\n          two\n    three"


WRITTEN = ["argparse", "fractions", "inspect", "json.decoder", "statistics", "torch.nn.functional"]
WRITTEN += ["torch.functional", "torch.nn.modules.conv", "transformers.models.gpt2.modeling_gpt2"]


def refusal(definition):
    try:
        source_of(definition)
    except TravelError as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize("name", WRITTEN)
def test_libraries_are_what_they_say(name):
    """Nothing that was loaded as it stands is taken for another one."""
    found = [each for each in vars(importlib.import_module(name)).values() if isinstance(each, (FunctionType, type))]
    own = [each for each in found if each.__module__ == name and not hasattr(each, "__wrapped__")]
    refused = [refusal(each) for each in own]
    assert "" in refused
    assert not [why for why in refused if "changed since" in why]
