"""A table of predictions that is written again, and changed by a person."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.prediction_photos import write_predictions
from helpers.tiny_models import raises_one_line, save_classifier

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


def list_names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_the_same_command_writes_the_same_table(table: Path, repeat: Command) -> None:
    expected = table.read_bytes()
    parts = table.with_name(".table.csv.unfinished")
    parts.mkdir()  # As killed runs leave it
    (parts / "0.arrow").write_bytes(b"cut off")
    table.with_name(".table.csv.0a1b.unfinished").touch()
    repeat()
    assert table.read_bytes() == expected
    assert list_names(table.parent) == [".table.csv.written", "table.csv"]


def test_photos_and_models_may_change(photos: Path, table: Path, repeat: Command) -> None:
    other_model = save_classifier(table.parent / "other", "x", "y")
    write_predictions(other_model, photos, table)
    assert len(table.read_text().splitlines()) == 10
    table.unlink()
    repeat()
    assert len(table.read_text().splitlines()) == 7


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
    table: Path, repeat: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_links_are_not_followed(table: Path, repeat: Command) -> None:
    written, theirs = table.with_name(".table.csv.written"), table.with_name("theirs")
    written.symlink_to(written.rename(table.with_name("elsewhere")))
    with raises_one_line("table.csv exists"):
        repeat()
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
    model: Path, photos: Path, table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(photos, table.with_name("photos"))  # A line is said once
    write_predictions(model, folder, table)
    assert f"left out: {folder / '.hidden'} (images: 1)" in caplog.messages[-1]
