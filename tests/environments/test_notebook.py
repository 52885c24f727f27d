"""Bodies in the cells of a notebook, on a kernel of the interpreter that runs the tests."""

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

SETUP = """
import torch
from nnsight import NNsight
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
model = NNsight(net)
x = torch.ones(3, 2)
"""
TRACE = """
with model.trace(x) as tracer:
    hidden = model[0].output.save()
    model[1].output[:] = 0
    out = tracer.result.save()
print(torch.equal(hidden, net[0](x)), torch.equal(out, net[2](torch.zeros(3, 2))))
"""
TIMED = """
%%time
with model.trace(x):
    timed = model[0].output
print(torch.equal(timed, hidden))
"""
AWAITED = """
import asyncio
async def trace(value):
    with model.trace(value):
        await asyncio.sleep(0)
        first = model[0].output
        await asyncio.sleep(0)
        return torch.equal(first, net[0](value)) and torch.equal(model.output, net(value))
print(await asyncio.gather(trace(x), trace(x + 1)))
with model.trace(x):
    await asyncio.sleep(0)
    last = model[0].output
print(torch.equal(last, hidden))
"""
LATE = """
with model.trace(x):
    model[2].output

    model[0].output = x
"""
AFTER = "print(all('forward' not in vars(module) for module in net.modules()))"


def output_of(cell):
    return "".join(found.text for found in cell.outputs if found.output_type == "stream" and found.name == "stdout")


@pytest.mark.usefixtures("kernels")
@pytest.mark.filterwarnings("default")  # those of the notebook's own libraries
def test_cells(tmp_path):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell(source.strip()) for source in (SETUP, TRACE, TIMED, AWAITED, LATE, AFTER, TRACE)
    ]
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="here",
        timeout=100,
        allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    setup, trace, timed, awaited, late, after, again = notebook.cells
    assert setup.outputs == []
    assert output_of(trace) == "True True\n"
    assert output_of(timed).startswith("True\n")
    assert output_of(awaited) == "[True, True]\nTrue\n"
    (error,) = (found for found in late.outputs if found.output_type == "error")
    assert error.ename == "OutOfOrderError"
    assert "line 4 of" in error.evalue
    assert output_of(after) == "True\n"
    assert output_of(again) == "True True\n"
