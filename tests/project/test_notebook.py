"""`notebooks/quickstart.ipynb`: committed with its outputs, and each cell still works."""

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests import ROOT


NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def kinds_of(cell: NotebookNode) -> set[str]:
    """The kinds of a cell's output: "stream", or the MIME types of its pictures and values."""
    return {kind for output in cell.outputs for kind in output.get("data", {output.output_type: None})}


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_notebook_is_committed_as_one_run_from_top_to_bottom():
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in kinds_of(cell) for cell in cells) == 3
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


def test_notebook_names_no_folder_of_a_machine():
    text = NOTEBOOK.read_text()
    assert str(ROOT) not in text and "/home/" not in text and "/root/" not in text


@pytest.mark.long
def test_each_cell_of_the_notebook_shows_what_it_showed(tmp_path, quick_demo):
    for name in ("sq_llava", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(quick_demo)
    (tmp_path / "notebooks").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shown = [kinds_of(cell) for cell in code_cells(notebook)]
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path / "notebooks"}})
    client.execute()
    assert [kinds_of(cell) for cell in code_cells(notebook)] == shown
