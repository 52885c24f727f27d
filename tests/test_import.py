"""What `import nnsight` loads and touches, seen in a process of its own."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys, types, warnings
import greenlet, torch

touched = set()
on = True

class WatchedSys(types.ModuleType):
    @property
    def argv(self):
        if on:
            touched.add("sys.argv")
        return []

def watch(event, arguments):
    if on and event.startswith("socket."):
        touched.add(event)

before = set(sys.modules)
sys.__class__ = WatchedSys
sys.addaudithook(watch)
warnings.simplefilter("error")
import {module}
on = False
print(json.dumps({{"loaded": sorted(set(sys.modules) - before), "touched": sorted(touched)}}))
"""


def imported(module, folder):
    command = [sys.executable, "-c", PROBE.format(module=module)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def foreign(modules):
    return {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"nnsight"}


def test_import_loads_nothing_but_torch_and_greenlet(tmp_path):
    assert foreign(imported("nnsight", tmp_path)["loaded"]) == set()


def test_import_reads_no_arguments_and_opens_no_network(tmp_path):
    assert imported("nnsight", tmp_path)["touched"] == []


@pytest.mark.parametrize(
    ("text", "touched"),
    [
        ("import sys; sys.argv[1:]", "sys.argv"),
        ("from sys import argv", "sys.argv"),
        ("import socket; socket.socket()", "socket.__new__"),
    ],
)
def test_probe_sees_what_an_import_touches(text, touched, tmp_path):
    (tmp_path / "meddler.py").write_text(text)
    seen = imported("meddler", tmp_path)
    assert touched in seen["touched"]
    assert foreign(seen["loaded"]) == {"meddler"}
