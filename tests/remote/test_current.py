"""What travels is what runs here: a file that was changed after it was loaded is not sent in its place."""

import importlib
import itertools
import linecache
import os

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
