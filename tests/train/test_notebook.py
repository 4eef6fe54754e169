"""The notebook runs, and what is committed is what such a run left."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


@pytest.mark.slow
def test_it_runs_and_the_loss_falls(notebook, tmp_path):
    (parameters,) = (c for c in code(notebook) if "parameters" in c.metadata.get("tags", ()))
    parameters.source = "STEPS, BATCH, PROBLEMS = 20, 16, 16"
    notebook.cells.append(new_code_cell("import json; print(json.dumps(losses))"))
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    # A user's process has one device, and a history of its own.
    client.execute(env={**os.environ, "XLA_FLAGS": "", "IPYTHONDIR": str(tmp_path)})
    losses = json.loads(printed(notebook.cells[-1]))
    assert len(losses) == 20 and sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_committed_one_ran_from_top_to_bottom(notebook):
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 1
    for cell in cells:
        assert bool(printed(cell)) == ("print(" in cell.source), cell.source


def test_the_committed_one_shows_that_the_model_learned(notebook):
    (text,) = (printed(cell) for cell in code(notebook) if "% before" in printed(cell))
    before, after = re.search(r"ride +([\d.]+)% before, +([\d.]+)% after", text).groups()
    assert float(before) < 5 and float(after) > 80


def test_it_names_no_machine(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    text = nbformat.writes(notebook)
    assert not re.search(r"/(home|root|tmp|usr|opt|var|mnt|work|Users|content)/", text)
    address = re.search(r'REPOSITORY = \\"https://(github\.com/[\w-]+/\w+)\\"', text)[1]
    badge = re.search(r"colab\.research\.google\.com/([\w/-]+)/blob/main/([\w/.]+)\)", text)
    assert badge[1].replace("github/", "github.com/") == address
    assert NOTEBOOK.parents[1] / badge[2] == NOTEBOOK
