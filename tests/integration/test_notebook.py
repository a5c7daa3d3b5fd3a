"""The notebooks and the programs of docs/course.md run completely, without a network."""

import re
from pathlib import Path

import nbformat
import pytest
from helpers.doc_pages import ROOT, read_blocks
from helpers.sample_photographs import photograph
from helpers.tiny_models import build_tiny_config, save_with_processor
from nbclient import NotebookClient
from PIL import Image
from pytest import MonkeyPatch

from modeling_vitcls import ViTCLSModel


NOTEBOOK = ROOT / "notebooks/photos.ipynb"
TOKENS = ROOT / "notebooks/tokens.ipynb"


@pytest.fixture
def offline(monkeypatch: MonkeyPatch) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def notebook(offline: None) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def run(notebook: nbformat.NotebookNode, folder: Path) -> str:
    """Run a notebook in a folder, and return what it prints."""
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


def write_phone_photos(folder: Path, *kinds: str) -> None:
    """Write photos as phones and their owners leave them: HEIC, a folder of one object, and other files."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    for place, kind in enumerate(kinds):
        (folder / kind / f"{kind}1").mkdir(parents=True)
        for number in range(12):
            left, top = 30 * number, 60 * place
            photo = photograph("china.jpg").crop((left, top, left + 240, top + 200))
            name = f"{kind}1/{number}.jpg" if number < 2 else f"{number}.HEIC"
            photo.save(folder / kind / name)
        (folder / kind / ".DS_Store").write_bytes(b"Bud1")
        (folder / kind / "film.MOV").write_bytes(b"film")


@pytest.mark.parametrize(
    ("path", "image"), [(NOTEBOOK, "image/jpeg"), (TOKENS, "image/png")], ids=["photos", "tokens"]
)
def test_a_notebook_is_stored_with_its_outputs(path: Path, image: str) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any(image in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 400_000


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_the_notebook_of_the_tokens_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(TOKENS, as_version=4)
    training = next(cell for cell in notebook.cells if "EPOCHS, BATCH = 20" in cell.source)
    training.source = training.source.replace("EPOCHS, BATCH = 20", "EPOCHS, BATCH = 5")
    printed = run(notebook, tmp_path)
    assert int(re.findall(r"=== both heads: (\d+) of 360 right", printed)[0]) > 180
    assert float(re.findall(r"=== largest change of a logit: (\S+)", printed)[0]) < 1e-5


@pytest.mark.slow
def test_the_notebook_runs(notebook: nbformat.NotebookNode, tmp_path: Path) -> None:
    printed = run(notebook, tmp_path)
    perfect, swapped = re.findall(r"=== frame: (\d+)%; .*: (\d+) of 20 right", printed)[0]
    assert int(perfect) >= 95
    assert int(swapped) < 5
    accuracies = dict(re.findall(r"=== shots (.*): (\d+)%", printed))
    assert int(accuracies["divided"]) > 80
    assert int(accuracies["kept together"]) < 75
    assert (tmp_path / "runs/photos/results.json").exists()
    assert (tmp_path / "runs/more/certificate.json").exists()


@pytest.mark.slow
def test_the_notebook_runs_with_own_photos_as_it_says(
    notebook: nbformat.NotebookNode, tmp_path: Path
) -> None:
    """The cell below "Draw photos" is deleted."""
    write_phone_photos(tmp_path / "mine", "hat", "shoe")
    write_phone_photos(tmp_path / "other", "sock")
    encoder = ViTCLSModel(build_tiny_config(), add_pooling_layer=False)
    save_with_processor(encoder, tmp_path / "vit")
    (heading,) = (
        place for place, cell in enumerate(notebook.cells) if "## Draw photos" in cell.source
    )
    del notebook.cells[heading + 1]
    settings = 'PHOTOS, NEW, MODEL = "mine", "other", "vit"'
    notebook.cells[heading + 1].source = settings
    printed = run(notebook, tmp_path)
    assert re.search(r"of 12 right$", printed, re.MULTILINE)
    assert re.search(r"=== \d of 2 other photos of sock are recognized", printed)


def test_the_programs_of_the_course_run_on_the_photos_of_phones(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_phone_photos(tmp_path / "photos", "pants")
    blocks = read_blocks(ROOT / "docs/course.md")
    for block in [block for block in blocks if block.language == "python"]:
        exec(block.text, {})
    framed = [file.relative_to("frame/pants").as_posix() for file in Path("frame").rglob("*.jpg")]
    assert sorted(framed) == sorted(
        ["pants1/0.jpg", "pants1/1.jpg", *(f"{number}.jpg" for number in range(2, 12))]
    )
    assert Image.open("frame/pants/2.jpg").size == (306, 266)
