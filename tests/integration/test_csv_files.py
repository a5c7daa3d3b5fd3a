"""Files of predictions: spreadsheets run nothing, and no earlier file is lost."""

import csv
from pathlib import Path

import pytest
from helpers.command_in_process import run_here
from helpers.full_disk import limited_file_size
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config, save_with_processor

from modeling_vitcls import ViTCLSForImageClassification


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

NAMES = ("=1+1", "@SUM(A1)", "-2\n3")
LABELS = {
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: index for index, name in enumerate(NAMES)},
}
FORMULA_PREFIXES = tuple("=+-@\t\r")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return photographs of classes, and of a file, whose names are harmful in a table."""
    folder = write_photos(tmp_path_factory.mktemp("photos"), range(8), *NAMES)
    (folder / NAMES[0] / "0.png").rename(folder / NAMES[0] / "\x1b[31m\u202e.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ViTCLSForImageClassification(build_tiny_config(**LABELS))
    return save_with_processor(model, tmp_path_factory.mktemp("models") / "model")


def check_cells(file: Path) -> None:
    """Check that no cell begins like a formula, or contains control or invisible characters."""
    with file.open(newline="", encoding="utf-8") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert not [cell for cell in cells if cell.startswith(FORMULA_PREFIXES)]
    assert all(map(str.isprintable, cells))
    assert any("=1+1" in cell for cell in cells)
    assert any("\\x1b[31m\\u202e" in cell for cell in cells)


def test_predictions_contain_no_formulas(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    output = tmp_path / "labels.csv"
    assert (
        run_here("predict", "--model", model, *NAMES[:2], "--top-k", "3", "--output", output) == 0
    )
    check_cells(output)


def test_a_full_disk_keeps_the_earlier_file_and_is_named(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.parquet"
    file.write_text("earlier")
    data = ["--dataset", photos, "--held-out-fraction", "0.5", "--num-workers", "0"]
    with limited_file_size(1000):
        assert run_here("evaluate", "--model", model, *data, "--per-image", file) == 1
    printed = capsys.readouterr()
    assert f"cannot write {tmp_path}" in printed.err
    assert printed.err.count("\n") == 1
    assert file.read_text() == "earlier"
