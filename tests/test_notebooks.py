"""Every notebook runs from top to bottom in an empty folder, and is stored without outputs."""

from pathlib import Path

import nbformat
import pytest
from hub_server import TOKEN, environment, running_hub
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("IGPO_SMALL", "1")
    monkeypatch.setenv("IGPO_CACHE", str(tmp_path / "cache"))
    with running_hub() as hub:
        for name, value in environment(hub, tmp_path / "hub", TOKEN).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # a protocol of its own
        monkeypatch.setenv("IGPO_REPOSITORY", "tester/agent")
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    if any("push_to_hub" in cell.source for cell in notebook.cells if cell.cell_type == "code"):
        pushed = hub.repositories["tester/agent"].files
        assert {"config.json", "model.safetensors"} <= pushed.keys() and b"igpo" in pushed["README.md"]
    kinds = {
        kind
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for kind in output.get("data", {output.output_type: None})
    }
    assert "image/png" in kinds and "error" not in kinds


def test_notebook_is_short_and_stored_without_outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(len(cell.source.splitlines()) for cell in code) <= 150
    for cell in code:
        assert cell.outputs == [] and cell.execution_count is None
