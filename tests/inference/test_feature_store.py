"""The file of kept features: what it returns, and what happens to a command if it is unusual."""

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest import LogCaptureFixture, MonkeyPatch

from modeling_vitcls.inference import feature_store
from modeling_vitcls.inference.feature_store import STORE_FILE, FeatureStore


NUM_PHOTOS = 20


def write(file: Path, start: int = 0) -> FeatureStore:
    """Write the rows of 20 photos: 2,000 times their number."""
    store = FeatureStore(file, b"key")
    for index in range(NUM_PHOTOS):
        assert store.prepare(index, str(start + index).encode(), dict) == {}
    store.write(range(NUM_PHOTOS), torch.arange(start, start + NUM_PHOTOS).repeat(2000, 1).T)
    store.flush()
    return store


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "cache" / STORE_FILE
    write(file)
    return file


def list_found(store: FeatureStore) -> list[int]:
    """List the photos whose rows are found and right."""
    rows = [
        store.prepare(0, str(number).encode(), lambda: torch.tensor(-1)) for number in range(99)
    ]
    return [number for number, row in enumerate(rows) if (row == number).all()]


def test_photos_are_found_by_their_content_and_the_key_of_the_pass(file: Path) -> None:
    assert list_found(FeatureStore(file, b"key")) == [*range(NUM_PHOTOS)]
    assert not list_found(FeatureStore(file, b"other"))


def test_a_damaged_row_counts_as_missing(file: Path) -> None:
    content = file.read_bytes()
    place = content.index(torch.full([99], 3.0).numpy().tobytes())
    file.write_bytes(content[:place] + b"?" + content[place + 1 :])
    found = list_found(FeatureStore(file, b"key"))
    assert {*range(NUM_PHOTOS)}.difference(found) == {3}


def test_a_file_that_changes_while_it_is_read_is_not_kept(file: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo"
    photo.write_text("a")
    store = FeatureStore(file, b"key")
    store.prepare(0, str(photo), lambda: photo.write_text("b"))
    store.write([0], torch.ones(1, 5))
    assert not store.waiting


def test_the_photos_that_were_not_used_for_the_longest_time_are_removed(
    file: Path, monkeypatch: MonkeyPatch
) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE features SET day = day - 2")
    store = FeatureStore(file, b"key")
    for number in range(5):
        store.prepare(0, str(number).encode(), dict)  # Used today
    store.flush()
    monkeypatch.setattr(feature_store, "MAX_BYTES", 300_000)
    found = list_found(write(file, start=50))
    assert {*range(5), *range(60, 70)} <= {*found}
    assert len(found) < 40
    assert file.stat().st_size < 600_000


def damage(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:100] + os.urandom(len(content) - 100))


def make_link(file: Path) -> None:
    file.symlink_to(file.rename(file.with_name("elsewhere")))


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_folder(file: Path) -> None:
    file.unlink()
    file.parent.rmdir()
    file.parent.touch()


@pytest.mark.parametrize(
    "change",
    [damage, make_link, make_pipe, replace_folder, lambda file: file.chmod(0o602)],
)
def test_an_unusual_file_is_not_used_and_said_in_one_line(
    change: Callable[[Path], None], file: Path, caplog: LogCaptureFixture
) -> None:
    change(file)
    assert not list_found(write(file))
    (message,) = caplog.messages
    assert "are not kept" in message
    assert "\n" not in message
