"""Measuring tools see the lines of a body, those of the model, and what follows."""

import json
import sys

import pytest

SCRIPT = """
import sys
import torch
from nnsight import NNsight

class Double(torch.nn.Module):
    def forward(self, x):
        if x.sum() > 1e9:
            return None                       # not executed
        return x * 2                          # executed

model = NNsight(torch.nn.Sequential(Double(), torch.nn.ReLU(), Double()))

def run(x):
    with model.trace(x) as tracer:
        hidden = model[0].output              # executed
        if hidden.sum() > 1e9:
            hidden = None                     # not executed
        for envoy in model:
            kept = envoy.output               # executed
        try:
            raise KeyError
        except KeyError:
            out = tracer.result               # executed
    return out                                # executed

assert run(torch.ones(2)).sum() == 8
"""


def marked(script):
    lines = list(enumerate(script.lstrip().splitlines(), 1))
    return (
        {number for number, line in lines if line.endswith("# executed")},
        {number for number, line in lines if line.endswith("# not executed")},
    )


# What counts frames has to know of greenlets; what watches instructions (the default from 3.14) need not.
SETTINGS = [("ctrace", "greenlet,thread")] + ([("sysmon", "thread")] if sys.version_info >= (3, 12) else [])


@pytest.mark.parametrize(("core", "concurrency"), SETTINGS)
def test_coverage(python, environment, core, concurrency):
    environment["COVERAGE_CORE"] = core
    measure = ("-m", "coverage", "run", "--concurrency", concurrency, "--include=script.py")
    done = python(*measure, "script.py", script=SCRIPT)
    assert done.returncode == 0, done.stderr
    done = python("-m", "coverage", "json", "-o", "-", "-q")
    executed, missed = marked(SCRIPT)
    found = json.loads(done.stdout)["files"]["script.py"]
    assert executed <= set(found["executed_lines"])
    assert set(found["missing_lines"]) == missed


def test_cprofile(python):
    done = python("-m", "cProfile", "-s", "name", "script.py", script=SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "script.py:6(forward)" in done.stdout
