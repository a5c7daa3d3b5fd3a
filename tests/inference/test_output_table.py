"""A table of predictions that is written again, changed by a person and extended."""

import csv
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock
from helpers.prediction_photos import write_predictions
from helpers.tiny_models import raises_one_line, save_classifier

from modeling_vitcls.runtime import staging


Command = Callable[..., None]


@pytest.fixture(scope="module")
def model(module_path: Path) -> Path:
    return save_classifier(module_path)


@pytest.fixture(scope="module")
def other_model(module_path: Path) -> Path:
    """A classifier of other labels."""
    return save_classifier(module_path / "other", "x", "y")


@pytest.fixture
def photos(photos: Path, tmp_path: Path) -> Path:
    """Photographs to change."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


@pytest.fixture
def table(model: Path, photos: Path, tmp_path: Path) -> Path:
    """A table of nine photographs."""
    write_predictions(model, photos, tmp_path / "table.csv")
    return tmp_path / "table.csv"


@pytest.fixture
def repeat(model: Path, photos: Path, table: Path) -> Command:
    """The command that wrote the table, with other flags."""
    return partial(write_predictions, model, photos, table)


def list_names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_the_same_command_writes_the_same_table(table: Path, photos: Path, repeat: Command) -> None:
    expected = table.read_bytes()
    for name in (".table.csv.unfinished", ".table.csv.0a1b.unfinished"):
        table.with_name(name).mkdir()  # As killed runs leave it
    (table.parent / ".table.csv.unfinished/0.arrow").write_bytes(b"cut off")
    table.with_name(".table.csv.0a1b.unfinished").rmdir()
    table.with_name(".table.csv.0a1b.unfinished").touch()
    repeat()
    assert table.read_bytes() == expected
    assert list_names(table.parent) == [".table.csv.written", "photos", "table.csv"]


def test_a_table_that_was_removed_blames_no_other_model(
    other_model: Path, photos: Path, table: Path
) -> None:
    table.unlink()
    write_predictions(other_model, photos, table)
    assert len(table.read_text().splitlines()) == 10


def test_new_photos_are_added(photos: Path, table: Path, repeat: Command) -> None:
    shutil.copy(photos / "a.jpg", photos / "new.jpg")
    repeat()
    assert len(table.read_text().splitlines()) == 11


def test_a_table_that_a_person_has_changed_stays(table: Path, repeat: Command) -> None:
    table.write_text("my corrections")
    with raises_one_line("table.csv exists", "`overwrite`"):
        repeat()
    assert table.read_text() == "my corrections"
    repeat(overwrite=True)
    assert len(table.read_text().splitlines()) == 10
    assert table.with_name("table.edited.csv").read_text() == "my corrections"
    table.write_text("more corrections")
    repeat(overwrite=True)
    assert table.with_name("table.edited.csv").read_text() == "my corrections"
    assert table.with_name("table.edited-2.csv").read_text() == "more corrections"


def test_a_table_that_changes_while_it_is_computed_is_kept_beside(
    table: Path, repeat: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modeling_vitcls.inference import predict

    compute = predict.compute_rows

    def edit(*arguments: object) -> object:
        table.write_text("my corrections")
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(predict, "compute_rows", edit)
    repeat()
    assert table.with_name("table.edited.csv").read_text() == "my corrections"


def test_a_table_that_cannot_be_replaced_is_known_afterwards(
    table: Path, repeat: Command, monkeypatch: pytest.MonkeyPatch
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


def test_the_labels_that_another_model_changes_are_listed(
    other_model: Path, photos: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with table.open() as stream:
        before = {row["image"]: row["label"] for row in csv.DictReader(stream)}
    write_predictions(other_model, photos, table)
    assert "9 labels changed" in capsys.readouterr().out
    with table.open() as stream:
        after = {row["image"]: row["label"] for row in csv.DictReader(stream)}
    changed = pd.read_csv(table.with_name("table.changed.csv"))
    for name, labels in (("before", before), ("after", after)):
        rows = changed[changed["table"] == name]
        assert dict(zip(rows["image"], rows["label"], strict=True)) == labels


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl", ".csv"])
def test_photos_that_are_gone_are_named_and_leave_the_table(
    suffix: str,
    model: Path,
    photos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = tmp_path / f"table{suffix}"
    flags = {"delimiter": ";"} if suffix == ".csv" else {}
    write_predictions(model, photos, table, **flags)
    (photos / "inner").rename(tmp_path / "elsewhere")
    write_predictions(model, photos, table, **flags)
    assert f"left out of {table}: 6 of its earlier photos" in caplog.messages[-1]
    assert "changed" not in capsys.readouterr().out


def test_moved_and_replaced_photos_are_not_missed(
    model: Path, photos: Path, table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(photos / "c.png", photos / "b.JPEG")
    moved = photos.rename(photos.with_name("moved"))
    os.utime(moved / "a.jpg")
    write_predictions(model, moved, table)
    assert "1 of its earlier photos" in caplog.text  # b.JPEG as it was, under its old path


def test_a_digest_that_is_a_link_is_not_believed(table: Path, repeat: Command) -> None:
    written = table.with_name(".table.csv.written")
    written.symlink_to(written.rename(written.with_name("elsewhere")))
    with raises_one_line("table.csv exists"):
        repeat()


def test_a_folder_of_rows_that_is_a_link_is_not_followed(table: Path, repeat: Command) -> None:
    theirs = table.with_name("theirs")
    theirs.mkdir()
    (theirs / "keep.arrow").touch()
    table.with_name(".table.csv.unfinished").symlink_to(theirs)
    with raises_one_line("is a link"):
        repeat()
    assert list_names(theirs) == ["keep.arrow"]


def test_two_commands_do_not_write_one_table(
    table: Path, monkeypatch: pytest.MonkeyPatch, repeat: Command
) -> None:
    monkeypatch.setattr(staging, "LOCK_TIMEOUT", 0.0)
    parts = table.with_name(".table.csv.unfinished")
    parts.mkdir()
    with FileLock(parts / staging.LOCK_FILE), raises_one_line("in use by another command"):
        repeat()


def test_left_out_folders_are_named_again_at_the_end(
    model: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_predictions(model, photos, photos / "table.csv")
    assert f"left out: {photos / '.hidden'} (images: 1)" in caplog.messages[-1]
