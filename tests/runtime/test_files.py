"""Files are written completely or not at all, and text from files is printable."""

import os
from pathlib import Path

from helpers.tiny_models import raises_one_line
from pytest import MonkeyPatch

from modeling_vitcls.runtime.files import (
    read_json,
    replace_control_characters,
    write_atomically,
    write_json,
)


def test_json_is_read_and_written(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_json(file, {"loss": 0.1, "é": [None]})
    assert file.read_text() == '{\n  "loss": 0.1,\n  "\\u00e9": [\n    null\n  ]\n}\n'
    assert read_json(file) == {"loss": 0.1, "é": [None]}
    for content in (b"{", b"\xff", b"[1]"):
        file.write_bytes(content)
        with raises_one_line(str(file)):
            read_json(file)


def test_a_failed_write_keeps_the_file(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("before")

    for error, named in (
        (ValueError("no results"), "no results"),
        (OSError("no connection"), "no connection"),  # while the content is computed
        (OSError(28, "No space left on device", "hidden"), str(file)),
    ):
        with raises_one_line(named, error=type(error)), write_atomically(file) as unfinished_file:
            unfinished_file.write_text("after")
            assert file.read_text() == "before"
            raise error
        assert list(tmp_path.iterdir()) == [file]
        assert file.read_text() == "before"


def test_a_file_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Otherwise, the file may be empty after a power failure."""
    flushed: list[tuple[int, bool]] = []
    file = tmp_path / "results.json"
    monkeypatch.setattr(
        os, "fsync", lambda opened: flushed.append((os.fstat(opened).st_ino, file.exists()))
    )
    with write_atomically(file) as unfinished_file:
        unfinished_file.touch()
        assert unfinished_file.parent == tmp_path
        assert unfinished_file.name.startswith(".results.json.")
    assert flushed == [(file.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_two_writers_of_a_file_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """Process ids are not enough: on two hosts, they may be equal."""
    with (
        write_atomically(tmp_path / "a.txt") as first,
        write_atomically(tmp_path / "a.txt") as second,
    ):
        first.write_text("first")
        second.write_text("second")
        assert first.read_text() == "first"


def test_control_characters_and_invalid_bytes_are_replaced() -> None:
    assert replace_control_characters("é\ta\nb\x1b[2J\udcff c") == "é a b\ufffd[2J\ufffd c"
