"""Files of predictions: spreadsheets run nothing, and no earlier file is lost."""

import csv
from pathlib import Path

from helpers.command_in_process import run_here
from helpers.photo_folders import write_photos
from helpers.tiny_models import save_classifier
from pytest import MonkeyPatch


NAMES = ("=1+1", "@SUM(A1)", "-2\n3", "'=1+2")
FORMULA_PREFIXES = tuple("=+-@\t\r")


def check_cells(file: Path) -> None:
    """Check that no cell begins like a formula, or contains control or invisible characters."""
    with file.open(newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert not [cell for cell in cells if cell.startswith(FORMULA_PREFIXES)]
    assert all(map(str.isprintable, cells))
    assert any("=1+1" in cell for cell in cells)
    assert any("\\x1b[31m\\u202e" in cell for cell in cells)


def test_predictions_contain_no_formulas(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Names of classes and of a file are harmful in a table."""
    model = save_classifier(tmp_path / "model", *NAMES)
    photos = write_photos(tmp_path / "photos", range(8), *NAMES)
    (photos / NAMES[0] / "0.png").rename(photos / NAMES[0] / "\x1b[31m\u202e.png")
    monkeypatch.chdir(photos)
    predict = ["predict", "--model", model, "--top-k", "3", "--output"]
    assert run_here(*predict, tmp_path / "labels.csv", *NAMES[:2]) == 0
    check_cells(tmp_path / "labels.csv")
    other = save_classifier(tmp_path / "other", *(f"{name}?" for name in NAMES))
    again = ["predict", "--model", other, "--output", tmp_path / "labels.csv"]
    assert run_here(*again, *NAMES[:2]) == 0
    check_cells(tmp_path / "labels.changed.csv")
    # The quotes in its names are read back
    assert run_here(*predict, photos / "again.csv", *NAMES[:2]) == 0
    assert run_here(*predict, tmp_path / "more.csv", "--dataset", photos / "again.csv") == 0
