"""The file of kept features: what it returns, and what happens to a command if it is unusual."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeling_vitcls.inference import feature_store
from modeling_vitcls.inference.feature_store import STORE_FILE, FeatureStore
from modeling_vitcls.inference.inputs import Photo


KEY = b"k" * 16
SIZE = 5000  # Values of a photo


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / STORE_FILE


def open_store(file: Path, key: bytes = KEY) -> FeatureStore:
    return FeatureStore(file, key, np.dtype([("tokens", np.float32, SIZE)]))


def write(store: FeatureStore, values: dict[int, float]) -> None:
    """Keep one value, repeated, of each photo."""
    tokens = torch.tensor([[value] * SIZE for value in values.values()])
    store.write([Photo(None, photo) for photo in values], {"tokens": tokens})
    store.flush()


def read(store: FeatureStore, photos: Iterable[int] = range(200)) -> dict[int, float]:
    found = {photo: store.read(photo) for photo in photos}
    return {photo: row["tokens"].mean() for photo, row in found.items() if row is not None}


def execute(file: Path, statement: str) -> list[Any]:
    with sqlite3.connect(file) as connection:
        return connection.execute(statement).fetchall()


@pytest.fixture
def store(file: Path) -> FeatureStore:
    """A store with two photos."""
    store = open_store(file)
    write(store, {1: 10, 2: 20})
    return store


def test_photos_are_found_by_their_key_and_that_of_the_pass(
    file: Path, store: FeatureStore
) -> None:
    write(store, {2**63 - 1: 30})
    assert read(open_store(file), [1, 3, 2**63 - 1]) == {1: 10, 2**63 - 1: 30}
    assert read(open_store(file, b"j" * 16)) == {}
    assert file.stat().st_mode & 0o777 == 0o600  # Only for the user
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_two_commands_write_at_a_time_and_what_is_written_again_replaces(
    file: Path, store: FeatureStore
) -> None:
    other = open_store(file)
    write(other, {1: 11, 3: 30})
    write(store, {4: 40})
    assert read(store) == read(other) == {1: 11, 2: 20, 3: 30, 4: 40}
    assert execute(file, "SELECT count(*) FROM features") == [(4,)]


def test_a_damaged_row_counts_as_missing(file: Path, store: FeatureStore) -> None:
    content = file.read_bytes()
    place = content.index(np.full(20, 10, np.float32).tobytes())
    file.write_bytes(content[:place] + b"?" + content[place + 1 :])
    assert read(open_store(file)) == {2: 20}


def test_exchanged_rows_count_as_missing(file: Path, store: FeatureStore) -> None:
    execute(file, "UPDATE features SET photo = -photo")
    execute(file, "UPDATE features SET photo = 3 + photo")
    assert read(store) == {}


def test_the_photos_that_were_not_used_for_the_longest_time_are_removed(
    file: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, dict.fromkeys(range(20), 1))
    execute(file, "UPDATE features SET day = day - 2")
    read(store, range(5))  # Used today
    store.flush()
    monkeypatch.setattr(feature_store, "MAX_BYTES", 300_000)
    write(store, {99: 1})
    left = read(store)
    assert {*range(5), 99} <= left.keys()
    assert len(left) < 15
    assert file.stat().st_size < 600_000


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_folder(file: Path) -> None:
    shutil.rmtree(file.parent)
    file.parent.write_text("no folder")


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_bytes(file.read_bytes()[:100] + os.urandom(30_000)),
        lambda file: file.write_text("no database, but a text that is long enough to be one" * 100),
        lambda file: execute(file, "PRAGMA application_id=0"),
        lambda file: execute(file, f"PRAGMA user_version={feature_store.FORMAT + 1}"),
        lambda file: file.symlink_to(file.rename(file.with_name("elsewhere"))),
        lambda file: file.chmod(0o602),
        make_pipe,
        replace_folder,
    ],
    ids=["damaged", "text", "foreign", "newer", "link", "shared", "pipe", "no folder"],
)
def test_an_unusual_file_is_not_used_and_said_in_one_line(
    change: Callable[[Path], Any],
    file: Path,
    store: FeatureStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change(file)
    before = file.read_bytes() if file.is_file() else b""
    store = open_store(file)
    write(store, {3: 30})
    assert read(store) == {}
    assert (file.read_bytes() if file.is_file() else b"") == before
    (message,) = caplog.messages
    assert "features of photos are not kept" in message
    assert "VITCLS_CACHE" in message
    assert "\n" not in message


def test_a_full_disk_ends_the_keeping_and_nothing_else(
    file: Path, store: FeatureStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.connection is not None
    store.connection.execute("PRAGMA max_page_count=8")
    write(store, {3: 30})
    write(store, {4: 40})
    (message,) = caplog.messages
    assert "full" in message
    assert read(open_store(file)) == {1: 10, 2: 20}


def test_the_variable_names_the_folder_or_turns_it_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path.home()
    folders = {
        str(tmp_path): tmp_path,
        "~/elsewhere": home / "elsewhere",
        "": home / ".cache/vitcls",
    }
    for value, folder in folders.items():
        monkeypatch.setenv("VITCLS_CACHE", value)
        assert feature_store.find_store_file() == folder / STORE_FILE
    monkeypatch.setenv("VITCLS_CACHE", "none")
    assert feature_store.find_store_file() is None
