"""A table of predictions that is written again, and changed by a person."""

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from helpers.prediction_photos import write_predictions
from helpers.tiny_models import raises_one_line, save_classifier
from pytest import LogCaptureFixture, MonkeyPatch

from modeling_vitcls.inference import predict
from modeling_vitcls.runtime import staging


Command = Callable[..., None]


@pytest.fixture(scope="module")
def model(module_path: Path) -> Path:
    return save_classifier(module_path)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


@pytest.fixture
def repeat(model: Path, photos: Path, table: Path) -> Command:
    """The command that has written a table of six photographs, with other flags."""
    command = partial(write_predictions, model, photos / "inner", table)
    command()
    return command


def test_the_same_command_writes_the_same_table(table: Path, repeat: Command) -> None:
    expected = table.read_bytes()
    remainder = table.with_name(".table.csv.0a1b.unfinished")
    remainder.touch()  # As a run that is killed while the table is written leaves it
    repeat()
    assert table.read_bytes() == expected
    assert not remainder.exists()


def test_a_table_that_a_person_has_changed_stays(table: Path, repeat: Command) -> None:
    table.write_text("my corrections")
    with raises_one_line("table.csv exists", "`overwrite`"):
        repeat()
    assert table.read_text() == "my corrections"
    repeat(overwrite=True)
    assert len(table.read_text().splitlines()) == 7
    table.write_text("more corrections")
    repeat(overwrite=True)
    assert table.with_name("table.edited.csv").read_text() == "my corrections"
    assert table.with_name("table.edited.edited.csv").read_text() == "more corrections"


def test_a_table_that_changes_while_it_is_computed_is_kept_beside(
    table: Path, repeat: Command, monkeypatch: MonkeyPatch
) -> None:
    compute = predict.compute_rows

    def edit(*arguments: object) -> object:
        yield from compute(*arguments)  # type: ignore[arg-type]
        table.write_text("my corrections")

    monkeypatch.setattr(predict, "compute_rows", edit)
    repeat()
    assert table.with_name("table.edited.csv").read_text() == "my corrections"


def test_a_table_that_cannot_be_replaced_is_known_afterwards(
    table: Path, repeat: Command, monkeypatch: MonkeyPatch
) -> None:
    """A spreadsheet on Windows locks it."""
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if target == table:
            raise PermissionError(13, "Permission denied")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        for _ in range(3):
            with pytest.raises(OSError, match="Permission denied"):
                repeat(top_k=2)
    repeat(top_k=2)
    assert "label_2" in table.read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes")
def test_no_file_beside_the_table_is_written_through_a_link(
    model: Path, table: Path, repeat: Command
) -> None:
    """A downloaded folder may have links with these names."""
    precious = table.with_name("precious.txt")
    precious.write_text("mine")
    changed, edited, lock = ("table.changed.csv", "table.edited.csv", ".table.csv.lock")
    table.with_name(changed).symlink_to(precious)
    table.with_name(lock).symlink_to(precious)
    repeat()
    assert "label_before" in table.with_name(changed).read_text()

    table.write_text("my corrections")
    table.with_name(edited).symlink_to("new.sh")
    repeat(overwrite=True)
    assert not table.with_name("new.sh").exists()
    assert table.with_name("table.edited.edited.csv").read_text() == "my corrections"
    assert precious.read_text() == "mine"


def test_a_list_of_changes_that_a_person_has_edited_is_kept_beside(
    table: Path, repeat: Command
) -> None:
    changed = table.with_name("table.changed.csv")
    repeat()
    repeat()
    assert not table.with_name("table.changed.edited.csv").exists()
    changed.write_text("my remarks")
    repeat()
    assert table.with_name("table.changed.edited.csv").read_text() == "my remarks"
    assert "label_before" in changed.read_text()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_is_written_by_one_command_at_a_time(
    suffix: str, model: Path, photos: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "LOCK_TIMEOUT", 0.1)
    table = tmp_path / f"table{suffix}"
    compute = predict.compute_rows

    def start_second_command(*arguments: object) -> object:
        rows = list(compute(*arguments))  # type: ignore[arg-type]
        yield from rows[:3]
        monkeypatch.setattr(predict, "compute_rows", compute)
        with raises_one_line("is in use by another command", "`output`"):
            write_predictions(model, photos / "inner", table)
        yield from rows[3:]

    monkeypatch.setattr(predict, "compute_rows", start_second_command)
    write_predictions(model, photos / "inner", table)
    assert len(pd.read_csv(table) if suffix == ".csv" else pd.read_parquet(table)) == 6
    assert {file.name for file in tmp_path.iterdir()} == {table.name, f".{table.name}.written"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes")
def test_a_named_pipe_instead_of_a_table_is_an_error(
    model: Path, photos: Path, table: Path
) -> None:
    os.mkfifo(table)
    with raises_one_line("is not a regular file", error=OSError):
        write_predictions(model, photos / "inner", table)


def test_left_out_folders_are_named_again_at_the_end(
    model: Path, photos: Path, table: Path, caplog: LogCaptureFixture
) -> None:
    folder = shutil.copytree(photos, table.with_name("photos"))  # A line is said once
    write_predictions(model, folder, table)
    assert f"left out: {folder / '.hidden'} (images: 1)" in caplog.messages[-1]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_copies_of_a_photo_are_listed_once_each_if_their_label_changes(
    suffix: str, model: Path, photos: Path, tmp_path: Path
) -> None:
    folder, table = tmp_path / "photos", tmp_path / f"table{suffix}"
    shutil.copytree(photos / "inner", folder)
    first, *_ = sorted(folder.iterdir())
    shutil.copy(first, first.with_stem("copy"))
    write_predictions(model, folder, table)
    other = save_classifier(tmp_path / "other", "new", "names")
    write_predictions(other, folder, table)
    changed = pd.read_csv(tmp_path / "table.changed.csv")
    assert changed["image"].is_unique
    assert len(changed) == 7
