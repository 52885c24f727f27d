"""The code in docstrings and documents runs, and every public name shows some."""

from __future__ import annotations

import doctest
import importlib
import inspect
import linecache
import pkgutil
import re
from pathlib import Path

import pytest

import nnsight

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^(?P<mark><!-- not run[^\n]*-->\n)?```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
NOT_SHOWN = {"CONFIG"}  # an instance; its class has the example

modules = sorted(
    info.name for info in pkgutil.walk_packages(nnsight.__path__, "nnsight.") if not info.name.endswith("__main__")
)
documents = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
public = sorted(
    name for name in dir(nnsight) if not name.startswith("_") and not inspect.ismodule(getattr(nnsight, name))
)


def run_source(code: str, filename: str, namespace: dict[str, object]) -> None:
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
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
    for found in BLOCK.finditer(text):
        if not found["mark"]:
            line = text[: found.start("code")].count("\n")
            run_source("\n" * line + found["code"], str(ROOT / path), namespace)


@pytest.mark.parametrize("name", sorted(set(public) - NOT_SHOWN))
def test_public_names_have_a_runnable_example(name: str) -> None:
    found = getattr(nnsight, name)
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(found) or "")
    assert any(not example.options.get(doctest.SKIP) for example in examples), f"{name} has no example that runs"
