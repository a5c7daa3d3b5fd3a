"""A table of predictions that is interrupted, continued, changed by a person and extended.

`computed` has the names of the photos that were read, in the order of the runs.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers.prediction_photos import write_predictions
from helpers.tiny_models import raises_one_line, save_classifier

from modeling_vitcls.inference import predictor
from modeling_vitcls.runtime import staging


Command = Callable[..., None]


@pytest.fixture(scope="module")
def model(module_path: Path) -> Path:
    return save_classifier(module_path)


@pytest.fixture
def photos(photos: Path, tmp_path: Path) -> Path:
    """Photographs to change."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    prepare = predictor.prepare_image

    def note(processor: Any, content: Any, index: int) -> Any:
        names.append(Path(content).name)
        return prepare(processor, content, index)

    monkeypatch.setattr(predictor, "prepare_image", note)
    return names


@pytest.fixture
def table(model: Path, photos: Path, tmp_path: Path, computed: list[str]) -> Path:
    """A table of nine photographs, and its journal."""
    write_predictions(model, photos, tmp_path / "table.csv")
    assert len(computed) == 9
    computed.clear()
    return tmp_path / "table.csv"


@pytest.fixture
def repeat(model: Path, photos: Path, table: Path) -> Command:
    """The command that wrote the table, with other flags."""
    return partial(write_predictions, model, photos, table)


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.5, 0.8, 0.97])
def test_a_run_that_lost_its_last_block_ends_as_if_nothing_had_happened(
    kept: float, table: Path, computed: list[str], repeat: Command
) -> None:
    expected = table.read_bytes()
    table.unlink()
    remainder = table.with_name(".table.csv.0a1b.unfinished")
    remainder.touch()  # As a run that is killed while the table is written leaves it
    (part,) = (table.parent / ".table.csv.journal").glob("*.arrow")
    part.write_bytes(part.read_bytes()[: int(kept * part.stat().st_size)])
    repeat()
    assert table.read_bytes() == expected
    assert len(computed) == len(set(computed))
    assert len(computed) < 9 or kept < 0.5
    assert not remainder.exists()


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_an_interrupted_run_computes_no_batch_twice(
    suffix: str,
    model: Path,
    photos: Path,
    tmp_path: Path,
    computed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    whole, broken = tmp_path / f"whole{suffix}", tmp_path / f"broken{suffix}"
    flags = {"features": ("cls", "patches"), "feature_dtype": "float16"}
    write_predictions(model, photos, whole, **flags)
    computed.clear()
    note = predictor.prepare_image

    def interrupt(processor: Any, content: Any, index: int) -> Any:
        if len(computed) == 5:
            raise KeyboardInterrupt
        return note(processor, content, index)

    monkeypatch.setattr(predictor, "prepare_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_predictions(model, photos, broken, **flags)
    assert not broken.exists()

    monkeypatch.setattr(predictor, "prepare_image", note)
    write_predictions(model, photos, broken, **flags)
    assert "4 of 9 images are there" in capsys.readouterr().out
    assert len(computed) == 5 + 5
    assert broken.read_bytes() == whole.read_bytes()


def test_only_new_and_replaced_photos_are_computed(
    photos: Path, computed: list[str], repeat: Command
) -> None:
    shutil.copy(photos / "a.jpg", photos / "new.jpg")
    shutil.copy(photos / "c.png", photos / "b.JPEG")
    repeat()
    assert computed == ["b.JPEG", "new.jpg"]


def test_moved_photos_are_known_by_their_content(
    model: Path, photos: Path, table: Path, computed: list[str]
) -> None:
    """The row of a photo that was replaced before is not in the table, and is not missed."""
    (photos / "c.png").replace(photos / "b.JPEG")
    write_predictions(model, photos, table, overwrite=True)
    moved = photos.rename(photos.with_name("moved"))
    os.utime(moved / "b.JPEG")
    write_predictions(model, moved, table)
    assert not computed
    assert table.read_text().count(str(moved)) == 8


def test_an_unreadable_photo_is_tried_again(
    photos: Path, computed: list[str], repeat: Command
) -> None:
    (photos / "bad.jpg").write_bytes(b"no photo")
    for _ in range(2):
        repeat()
    assert computed == ["bad.jpg"] * 2


def test_a_table_that_a_person_has_changed_stays(table: Path, repeat: Command) -> None:
    table.write_text("my corrections")
    with raises_one_line("table.csv exists", "`overwrite`"):
        repeat()
    assert table.read_text() == "my corrections"
    repeat(overwrite=True)
    assert len(table.read_text().splitlines()) == 10


def test_rows_of_other_photos_are_not_dropped(photos: Path, table: Path, repeat: Command) -> None:
    (photos / "inner").rename(table.with_name("elsewhere"))
    with raises_one_line("images that are not among these (6)", "`overwrite`"):
        repeat()
    repeat(overwrite=True)
    repeat()
    assert len(table.read_text().splitlines()) == 4


def test_rows_of_other_settings_and_models_are_not_mixed(
    photos: Path, table: Path, tmp_path: Path, computed: list[str], repeat: Command
) -> None:
    other = save_classifier(tmp_path / "other", num_labels=5)
    with raises_one_line("another top_k"):
        repeat(top_k=2)
    with raises_one_line("another model"):
        write_predictions(other, photos, table)
    assert not computed
    write_predictions(other, photos, table, overwrite=True)
    assert len(computed) == 9


@pytest.mark.parametrize(
    ("settings", "words"),
    [("{", "settings.json"), ('{"list of columns": ["index"]}', "another list of columns")],
)
def test_a_journal_that_is_damaged_or_of_another_version_is_computed_again_on_request(
    settings: str, words: str, table: Path, computed: list[str], repeat: Command
) -> None:
    (table.parent / ".table.csv.journal/settings.json").write_text(settings)
    with raises_one_line(words, "`overwrite`"):
        repeat()
    repeat(overwrite=True)
    assert len(computed) == 9


def test_two_commands_do_not_write_one_table(
    table: Path, monkeypatch: pytest.MonkeyPatch, repeat: Command
) -> None:
    monkeypatch.setattr(staging, "LOCK_TIMEOUT", 0.0)
    lock = table.parent / f".{table.name}.journal" / staging.LOCK_FILE
    with FileLock(lock), raises_one_line("in use by another command"):
        repeat()


def test_left_out_folders_are_named_again_at_the_end(
    model: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_predictions(model, photos, photos / "table.csv")
    assert f"left out: {photos / '.hidden'} (images: 1)" in caplog.messages[-1]
