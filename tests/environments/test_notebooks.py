"""The notebooks run from top to bottom, and say what they say in the repository."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 100_000


def outputs_of(notebook):
    """What each cell prints, and the kinds of what it shows."""
    found = []
    for outputs in (cell.outputs for cell in notebook.cells if cell.cell_type == "code"):
        printed = "".join(one.text for one in outputs if one.output_type == "stream" and one.name == "stdout")
        found.append((printed, [sorted(one.data) for one in outputs if one.output_type != "stream"]))
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.filterwarnings("default")  # those of the notebook's own libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    shown = outputs_of(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, kernel_name="here", timeout=200, resources=resources).execute()
    assert outputs_of(notebook) == shown
    assert any("image/png" in kinds for _, pictures in shown for kinds in pictures)


def test_notebooks_are_there_and_small():
    assert [path.stem for path in NOTEBOOKS] == ["first_steps", "patching", "steering"]
    assert all(path.stat().st_size < MOST_BYTES for path in NOTEBOOKS)
