"""A context manager that runs its block where its body would have run, and modules made from text."""

import asyncio
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from nnsight._capture import Scope, bind, capture, is_skip, skip_body

SRC = Path(__file__).parents[2] / "src"


class Later:
    """Skip the body, then run it `times` times on the variables of the frame."""

    def __init__(self, times=1, values=None, **flow):
        self.times = times
        self.values = values
        self.flow = flow

    def __enter__(self):
        frame = sys._getframe(1)
        self.block = capture(frame)
        self.scope = Scope(frame)
        skip_body(frame)
        return "the value that nobody sees"

    def __exit__(self, exc_type, exc, traceback):
        if not is_skip(exc_type):
            assert exc_type is not None, "the body was not skipped"
            return False
        run = bind(self.block, self.scope, **self.flow)
        try:
            for step in range(self.times):
                run(self.values[step] if self.values else step)
        finally:
            self.scope.write_back(self.block.names_bound)
            self.scope.close()
        return True


class Awaited(Later):
    """As `Later`, entered by `async with`."""

    def __aenter__(self):
        self.frame = sys._getframe(1)
        self.block = capture(self.frame, waits=True)
        self.scope = Scope(self.frame)
        return self

    def __await__(self):
        return self

    def __next__(self):
        stop, frame = StopIteration("the value that nobody sees"), self.frame
        skip_body(frame)
        raise stop

    async def __aexit__(self, *error):
        await asyncio.sleep(0)
        return self.__exit__(*error)


@pytest.fixture(name="Later")
def later_class():
    return Later


@pytest.fixture
def load(tmp_path):
    """Write a module to a file and import it, with some globals there beforehand."""

    def load(source, name="user", **names):
        path = tmp_path / f"{name}.py"
        path.write_text(source if source.startswith("#raw") else dedent(source), encoding="utf-8", newline="")
        spec = importlib.util.spec_from_file_location(f"{name}_{os.urandom(4).hex()}", path)
        module = importlib.util.module_from_spec(spec)
        vars(module).update({"Later": Later, "Awaited": Awaited} | names)
        spec.loader.exec_module(module)
        return module

    return load


SCRIPT = """\
import importlib.util, sys
spec = importlib.util.spec_from_file_location("later", {conftest!r})
later = importlib.util.module_from_spec(spec)
spec.loader.exec_module(later)
Later = later.Later
"""


@pytest.fixture
def script(tmp_path):
    """Run text as a program of its own, under `python` with the arguments given."""

    def script(source, *arguments, stdin=None, name="script.py"):
        path = tmp_path / name
        path.write_text(SCRIPT.format(conftest=__file__) + dedent(source), encoding="utf-8")
        command = [sys.executable, *arguments, *([str(path)] if stdin is None or "pdb" in arguments else [])]
        env = os.environ | {
            "PYTHONPATH": str(SRC),
            "PYTHONWARNINGS": "default",
            "COVERAGE_FILE": str(tmp_path / ".coverage"),
        }
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            env=env,
            cwd=tmp_path,
            timeout=120,
            check=False,
        )
        return path, done

    return script
