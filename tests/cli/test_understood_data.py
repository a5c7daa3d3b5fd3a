"""The first lines of a run say how its dataset was understood."""

from pathlib import Path
from typing import Any

import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.command_in_process import run_here
from helpers.photo_folders import write_photos


TINY = (
    "--model vitcls-tiny --image-size 8 --patch-size 4 --hidden-size 8 --num-hidden-layers 1 "
    "--num-attention-heads 2 --intermediate-size 16 --batch-size 4 --num-workers 0"
).split()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Return a table whose rows are 01 or 1, in splits of its own, with two photos per patient."""
    paths = sorted(write_photos(tmp_path, range(20)).glob("*/*.png"))
    lines = ["file_name,label,split,patient"]
    for index, path in enumerate(paths):
        label = "" if index == 7 else "01" if path.parent.name == "cat" else "1"
        part = "test" if index % 4 == 3 else "train"
        lines.append(f"{path.parent.name}/{path.name},{label},{part},p{index // 2}")
    (tmp_path / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "table.csv"


def train(table: Path, *flags: str) -> int:
    reset_accelerate()
    output = str(table.parent / "run")
    return run_here(
        "finetune",
        *TINY,
        "--dataset",
        str(table),
        "--output-dir",
        output,
        "--max-steps",
        "1",
        *flags,
    )


def get_lines(text: str) -> dict[str, str]:
    """Return the lines of the summary by name."""
    return {line.split(" ")[0]: line.partition(" ")[2].strip() for line in text.splitlines()}


def test_a_run_shows_classes_labels_splits_and_groups(
    table: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert train(table) == 0
    lines = get_lines(capsys.readouterr().out)
    assert "30 training images" in lines["data"]
    assert "9 held-out images (split 'test')" in lines["data"]
    assert lines["classes"] == "01: 19, 1: 20"
    assert lines["labels"] == "one label per image, from 'label', such as '01', '1'"
    assert lines["splits"] == "column 'split': train 30, test 10 rows"
    assert "'patient' is not used" in lines["groups"]
    assert "`group_column='patient'`" in lines["groups"]
    assert "skipped 1 of 10 images (no label)" in caplog.text


def test_groups_in_two_splits_of_a_table_are_named(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(table, "--group-column", "patient") == 0
    assert "groups are on both sides" in capsys.readouterr().out


def test_a_dataset_that_exists_nowhere_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(Path("nothere")) == 1
    error = capfd.readouterr().err
    assert "no file or folder nothere" in error or "not a file or folder" in error
