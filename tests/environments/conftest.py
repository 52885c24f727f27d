"""Programs that are run by an interpreter of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture
def environment():
    """The variables a child process needs to import nnsight from the source tree."""
    return os.environ | {"PYTHONPATH": str(SRC), "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def python(tmp_path, environment):
    """Run `python ARGUMENTS` in an empty folder; `script` becomes the file script.py there."""

    def python(*arguments, script=None, stdin=None):
        if script is not None:
            (tmp_path / "script.py").write_text(dedent(script).lstrip(), encoding="utf-8")
        return subprocess.run(
            [sys.executable, *arguments],
            input=None if stdin is None else dedent(stdin).lstrip(),
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            timeout=120,
            check=False,
        )

    return python


@pytest.fixture
def kernels(tmp_path, monkeypatch, environment):
    """A kernel `here` that is this interpreter, and no folder of the user's."""
    folder = tmp_path / "data" / "kernels" / "here"
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / ("data" if name == "JUPYTER_DATA_DIR" else name.lower())))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
