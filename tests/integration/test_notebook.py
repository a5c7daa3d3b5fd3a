"""notebooks/photos.ipynb runs completely, without a network."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "photos.ipynb"


def test_the_notebook_is_stored_with_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert NOTEBOOK.stat().st_size < 400_000


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "agg",
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )

    found = re.search(r"=== frame: (\d+)%; .*: (\d+) of 40 right", printed)
    assert found
    perfect, swapped = found.groups()
    assert int(perfect) >= 95
    assert int(swapped) < 10

    accuracies = dict(re.findall(r"=== (flat|burst): (\d+)%", printed))
    assert int(accuracies["flat"]) < 75
    assert int(accuracies["burst"]) < 75
    assert (tmp_path / "runs" / "photos" / "results.json").exists()
    assert (tmp_path / "runs" / "four" / "certificate.json").exists()
