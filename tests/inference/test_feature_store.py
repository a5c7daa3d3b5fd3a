"""The file of kept features: what it returns, and what happens to a command if it is unusual."""

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
import torch
from pytest import LogCaptureFixture, MonkeyPatch

from modeling_vitcls.inference import feature_store
from modeling_vitcls.inference.feature_store import STORE_FILE, FeatureStore


NUM_PHOTOS = 20


def write(file: Path, start: int = 0, key: bytes = b"key", days: int = 0) -> FeatureStore:
    """Write the rows of 20 photos: 2,000 times their number."""
    store = FeatureStore(file, key)
    store.today += days
    for index in range(NUM_PHOTOS):
        assert store.prepare(index, str(start + index).encode(), dict) == {}
    store.write(range(NUM_PHOTOS), torch.arange(start, start + NUM_PHOTOS).repeat(2000, 1).T)
    store.close()
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


@pytest.mark.parametrize(
    "value",
    ["NULL", "7", "7.5", "'text'", "x''", "x'01'", "row || row"],
)
def test_a_row_of_another_type_or_size_counts_as_missing(value: str, file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute(f"UPDATE features SET row = {value}")
    assert not list_found(FeatureStore(file, b"key"))
    write(file)
    assert len(list_found(FeatureStore(file, b"key"))) == NUM_PHOTOS


def test_a_row_with_another_number_of_values_counts_as_missing(file: Path) -> None:
    assert len(list_found(FeatureStore(file, b"key", 2000))) == NUM_PHOTOS
    assert not list_found(FeatureStore(file, b"key", 1999))


def test_the_photos_of_other_passes_that_were_not_used_for_the_longest_time_are_removed(
    file: Path, monkeypatch: MonkeyPatch
) -> None:
    write(file, 20, b"old", days=-2)
    monkeypatch.setattr(feature_store, "MAX_BYTES", 400_000)
    write(file, 50)
    assert not list_found(FeatureStore(file, b"old"))
    assert len(list_found(FeatureStore(file, b"key"))) == 2 * NUM_PHOTOS


def test_rows_of_the_future_are_removed_too(file: Path, monkeypatch: MonkeyPatch) -> None:
    write(file, 20, days=999)
    monkeypatch.setattr(feature_store, "MAX_BYTES", 400_000)
    write(file, 50)
    found = list_found(FeatureStore(file, b"key"))
    assert {*range(NUM_PHOTOS), *range(50, 70)} <= {*found}


def test_a_pass_never_removes_its_own_rows_and_says_how_many_it_keeps(
    file: Path, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    monkeypatch.setenv("VITCLS_CACHE_SIZE", "0.0003")
    write(file, 50)
    found = list_found(FeatureStore(file, b"key"))
    assert {*range(NUM_PHOTOS)} < {*found}
    (message,) = caplog.messages
    assert f"full: {len(found) - NUM_PHOTOS} of {NUM_PHOTOS} photos are kept" in message
    assert "VITCLS_CACHE_SIZE" in message


def test_passes_of_one_run_say_one_line_about_a_full_store(
    file: Path, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    monkeypatch.setenv("VITCLS_CACHE_SIZE", "0.0003")
    write(file, 50)
    write(file, 80)
    assert len(caplog.messages) == 1


def test_rows_wait_while_another_command_holds_the_file(
    file: Path, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    monkeypatch.setattr(feature_store, "TIMEOUT", 0.01)
    store = FeatureStore(file, b"key")
    with sqlite3.connect(file) as other:
        other.execute("BEGIN EXCLUSIVE")
        for number in range(50, 60):
            store.prepare(number, str(number).encode(), dict)
            store.write([number], torch.full((1, 2000), number))
            store.flush()
    store.close()
    assert {*range(50, 60)} <= {*list_found(FeatureStore(file, b"key"))}
    (message,) = caplog.messages
    assert "Remove the file" not in message


@pytest.fixture
def locked(file: Path, monkeypatch: MonkeyPatch) -> Iterator[sqlite3.Connection]:
    """Lock the file as another command does in a transaction, and let 5 rows wait at most."""
    monkeypatch.setattr(feature_store, "TIMEOUT", 0.01)
    monkeypatch.setattr(feature_store, "SHORT_TIMEOUT", 0.01)
    monkeypatch.setattr(feature_store, "MAX_WAITING", 5)
    other = sqlite3.connect(file)
    other.execute("BEGIN IMMEDIATE")
    yield other
    other.close()


def write_one(store: FeatureStore, number: int) -> None:
    store.prepare(number, str(number).encode(), dict)
    store.write([number], torch.full((1, 2000), number))
    store.flush()


def test_the_rows_that_wait_for_a_locked_file_are_limited_and_the_others_are_said(
    file: Path, locked: sqlite3.Connection, caplog: LogCaptureFixture
) -> None:
    store = FeatureStore(file, b"key")
    for number in range(50, 60):
        write_one(store, number)
    assert len(store.waiting) == 5
    locked.rollback()
    write_one(store, 60)  # The lock is gone: dropped, but what waits is written
    write_one(store, 61)
    store.close()
    assert {*list_found(FeatureStore(file, b"key"))} == {*range(20), *range(50, 55), 61}
    assert "features of 6 photos are not kept" in caplog.messages[-1]


def test_known_photos_that_wait_for_a_locked_file_are_limited_too(
    file: Path, locked: sqlite3.Connection
) -> None:
    store = FeatureStore(file, b"key")
    store.today += 1  # Their date is to be written
    assert len(list_found(store)) == NUM_PHOTOS
    assert len(store.waiting) == 5


def write_for_ever(store: FeatureStore) -> None:
    """Write rows of 50 photos again and again, and say which ones the file has."""
    for number in count():
        write_one(store, 50 + number % 49)
        store.file.with_name(f"written-{50 + number}").touch()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that was forked")
def test_a_killed_writer_loses_no_row_that_was_written(file: Path) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            write_for_ever(FeatureStore(file, b"key"))
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not file.with_name("written-60").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert {*range(NUM_PHOTOS), *range(50, 61)} <= {*list_found(FeatureStore(file, b"key"))}


def test_threads_say_one_line_about_a_damaged_file(file: Path, caplog: LogCaptureFixture) -> None:
    store = FeatureStore(file, b"key")
    damage(file)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.prepare(n, str(n).encode(), dict), range(99)))
    assert len(caplog.messages) == 1


def test_a_file_that_others_can_read_gets_its_mode_back(file: Path) -> None:
    file.chmod(0o644)
    assert len(list_found(FeatureStore(file, b"key"))) == NUM_PHOTOS
    assert file.stat().st_mode & 0o777 == 0o600


def damage(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:100] + os.urandom(len(content) - 100))


def make_link(file: Path) -> None:
    file.symlink_to(file.rename(file.with_name("elsewhere")))


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def open_side_file(file: Path) -> None:
    side = file.with_name(f"{STORE_FILE}-wal")
    side.touch()
    side.chmod(0o666)


def replace_folder(file: Path) -> None:
    file.unlink()
    file.parent.rmdir()
    file.parent.touch()


@pytest.mark.parametrize(
    "change",
    [
        damage,
        make_link,
        make_pipe,
        replace_folder,
        lambda file: file.chmod(0o602),
        lambda file: file.chmod(0o660),
        lambda file: file.parent.chmod(0o777),
        lambda file: file.parent.chmod(0o1777),
        lambda file: file.with_name(f"{STORE_FILE}-journal").symlink_to("elsewhere"),
        open_side_file,
    ],
)
def test_an_unusual_file_is_not_used_and_said_in_one_line(
    change: Callable[[Path], None], file: Path, caplog: LogCaptureFixture
) -> None:
    change(file)
    assert not list_found(write(file))
    (message,) = caplog.messages
    assert "are not kept" in message
    assert "\n" not in message
