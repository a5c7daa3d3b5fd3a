"""The file of kept features: what it returns, and what happens to a command if it is unusual."""

import os
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from modeling_vitcls.inference import feature_store
from modeling_vitcls.inference.feature_store import STORE_FILE, FeatureStore


KEY = b"k" * 16


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / STORE_FILE


def write(file: Path, contents: dict[int, bytes], key: bytes = KEY) -> FeatureStore:
    store = FeatureStore(file)
    for photo, content in contents.items():
        store.write(key, photo, content)
    store.flush()
    return store


def read(store: FeatureStore, photos: Iterable[int], key: bytes = KEY) -> dict[int, bytes]:
    found = {photo: store.read(key, photo) for photo in photos}
    return {photo: content for photo, content in found.items() if content is not None}


def test_photos_are_found_by_their_key_and_that_of_the_pass(file: Path) -> None:
    write(file, {1: b"one", 2**63 - 1: b"two"})
    store = FeatureStore(file)
    assert read(store, [1, 2, 2**63 - 1]) == {1: b"one", 2**63 - 1: b"two"}
    assert read(store, [1], b"j" * 16) == {}


def test_what_is_written_again_replaces_what_was_there(file: Path) -> None:
    store = write(file, {1: b"old"})
    write(file, {1: b"new"})
    assert read(store, [1]) == {1: b"new"}
    (number,) = sqlite3.connect(file).execute("SELECT count(*) FROM features").fetchone()
    assert number == 1


def test_a_damaged_row_counts_as_missing(file: Path) -> None:
    write(file, {1: b"a" * 5000, 2: b"b" * 5000})
    content = file.read_bytes()
    assert content.count(b"a" * 100) > 0
    place = content.index(b"a" * 100)
    file.write_bytes(content[:place] + b"?" + content[place + 1 :])
    assert read(FeatureStore(file), [1, 2]) == {2: b"b" * 5000}


def test_exchanged_rows_count_as_missing(file: Path) -> None:
    write(file, {1: b"one", 2: b"two"})
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE features SET photo = -photo")
        connection.execute("UPDATE features SET photo = 3 + photo")
    assert read(FeatureStore(file), [1, 2]) == {}


def test_the_photos_that_were_not_used_for_the_longest_time_are_removed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write(file, {photo: bytes(20_000) for photo in range(20)})
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE features SET day = day - 2")
    read(store, range(5))  # Used today
    store.flush()
    monkeypatch.setattr(feature_store, "MAX_BYTES", 300_000)
    write(file, {99: bytes(20_000)})
    left = read(store, range(100))
    assert {*range(5), 99} <= left.keys()
    assert len(left) < 15
    assert file.stat().st_size < 600_000


def test_two_commands_write_at_a_time(file: Path) -> None:
    first, second = FeatureStore(file), FeatureStore(file)
    for photo in range(10):
        first.write(KEY, photo, b"first")
        second.write(KEY, 100 + photo, b"second")
        first.flush()
        second.flush()
    assert len(read(FeatureStore(file), range(200))) == 20


def damage(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:100] + os.urandom(len(content) - 100))


def make_foreign(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE mine (id INTEGER)")


def make_newer(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA user_version=2")


def make_link(file: Path) -> None:
    file.symlink_to(file.rename(file.with_name("elsewhere")))


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def make_shared(file: Path) -> None:
    file.chmod(0o602)


def make_text(file: Path) -> None:
    file.write_text("no database, but a text that is long enough to be one" * 100)


def replace_folder(file: Path) -> None:
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("no folder")


@pytest.mark.parametrize(
    "change",
    [
        damage,
        make_foreign,
        make_newer,
        make_link,
        make_pipe,
        make_shared,
        make_text,
        replace_folder,
    ],
)
def test_an_unusual_file_is_not_used_and_said_in_one_line(
    change: Callable[[Path], None], file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(file, {1: b"one"})
    change(file)
    before = file.read_bytes() if file.is_file() else b""
    store = write(file, {2: b"two"})
    assert read(store, [1, 2]) == {}
    assert (file.read_bytes() if file.is_file() else b"") == before
    (message,) = caplog.messages
    assert "features of photos are not kept" in message
    assert "VITCLS_CACHE" in message
    assert "\n" not in message


def test_a_full_disk_ends_the_keeping_and_nothing_else(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = write(file, {1: b"one"})
    assert store.connection is not None
    store.connection.execute("PRAGMA max_page_count=8")
    store.write(KEY, 2, bytes(100_000))
    store.flush()
    store.write(KEY, 3, b"three")
    store.flush()
    assert "full" in caplog.text
    assert len(caplog.messages) == 1
    assert read(FeatureStore(file), [1, 2, 3]) == {1: b"one"}


def test_only_the_user_can_read_the_file(file: Path) -> None:
    write(file, {1: b"one"})
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_the_variable_names_the_folder_or_turns_it_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Any] = []
    for value in ("none", str(tmp_path), "~/elsewhere", ""):
        monkeypatch.setenv("VITCLS_CACHE", value)
        places.append(feature_store.find_store_file())
    home = Path.home()
    assert places[:2] == [None, tmp_path / STORE_FILE]
    assert places[2:] == [home / "elsewhere" / STORE_FILE, home / ".cache/vitcls" / STORE_FILE]
