"""The code in docstrings and documents runs, and every public name shows some."""

from __future__ import annotations

import doctest
import importlib
import inspect
import linecache
import pkgutil
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

import nnsight
from nnsight.envoy._source import Operation, Source
from nnsight.trace._barrier import Barrier
from nnsight.trace._cache import Cache, CacheEntry
from nnsight.trace._recording import CachedCall
from nnsight.trace._session import Session
from nnsight.trace._steps import Steps

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^(?P<mark><!-- not run[^\n]*-->\n)?```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
# vLLM's own classes are its bases, and vLLM has an environment of its own.
ELSEWHERE = {"nnsight.vllm._scheduler"}
NOT_SHOWN = {"CONFIG"}  # an instance; its class has the example

modules = sorted(
    info.name
    for info in pkgutil.walk_packages(nnsight.__path__, "nnsight.")
    if not info.name.endswith("__main__") and info.name not in ELSEWHERE
)
documents = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
public = sorted(
    name for name in dir(nnsight) if not name.startswith("_") and not inspect.ismodule(getattr(nnsight, name))
)


# What methods and properties of the public classes give.
HANDED_OUT = (Barrier, Cache, CacheEntry, CachedCall, Operation, Session, Source, Steps)


def members_of(classes: Iterable[type]) -> dict[str, object]:
    """The public methods and properties of the classes and of their bases here, by the class that defines them."""
    found = {}
    for cls in classes:
        for base in cls.__mro__:
            if base.__module__.partition(".")[0] == "nnsight":
                for name, value in vars(base).items():
                    if not name.startswith("_") and (isinstance(value, property) or callable(getattr(base, name))):
                        found[f"{base.__name__}.{name}"] = getattr(base, name)
    return found


MEMBERS = members_of([*(found for name in public if inspect.isclass(found := getattr(nnsight, name))), *HANDED_OUT])


def run_source(code: str, filename: str, namespace: dict[str, object], lines: Sequence[str] = ()) -> None:
    shown = [f"{line}\n" for line in lines or code.splitlines()]
    linecache.cache[filename] = (sum(map(len, shown)), None, shown, filename)
    exec(compile(code, filename, "exec"), namespace)


@pytest.mark.parametrize("name", modules)
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("path", documents)
def test_documents(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / path).read_text("utf-8")
    namespace: dict[str, object] = {"__name__": "document"}
    lines = [""] * text.count("\n")  # those of all blocks so far, where classes look for their source
    for found in BLOCK.finditer(text):
        if not found["mark"]:
            first = text[: found.start("code")].count("\n")
            code = found["code"].splitlines()
            lines[first : first + len(code)] = code
            run_source("\n" * first + found["code"], str(ROOT / path), namespace, lines)


@pytest.mark.parametrize("name", sorted(set(public) - NOT_SHOWN))
def test_public_names_have_a_runnable_example(name: str) -> None:
    assert has_example(getattr(nnsight, name)), f"{name} has no example that runs"


@pytest.mark.parametrize("kind", HANDED_OUT, ids=lambda kind: kind.__name__)
def test_what_public_names_give_has_a_runnable_example(kind: type) -> None:
    assert has_example(kind), f"{kind.__name__} has no example that runs"


@pytest.mark.parametrize("name", MEMBERS)
def test_public_methods_and_properties_have_a_runnable_example(name: str) -> None:
    assert has_example(MEMBERS[name]), f"{name} has no example that runs"


def has_example(found: object) -> bool:
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(found) or "")
    return any(not example.options.get(doctest.SKIP) for example in examples)


def test_members_are_found() -> None:
    """Those of a class's own bases too, not those of torch, and each where it is defined."""
    assert {
        "Envoy.device",
        "Values.output",
        "NNsight.trace",
        "TransformersModel.generator",
        "Tracer.iter",
    } <= MEMBERS.keys()
    assert not any(name.partition(".")[2].startswith("_") for name in MEMBERS)
    assert not any("Module." in name or "object." in name for name in MEMBERS)
