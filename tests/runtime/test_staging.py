"""A folder is written by one command at a time, completely or not at all."""

import errno
import itertools
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import raises_one_line
from pytest import MonkeyPatch

from modeling_vitcls.runtime import staging
from modeling_vitcls.runtime.errors import describe_error
from modeling_vitcls.runtime.staging import (
    check_output_is_empty,
    create_output_folder,
)


NAMES = ["config.json", "model.safetensors", "onnx/model.onnx"]
KILLED = 9  # exit status
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def write(output: Path, content: str = "") -> None:
    """Write a folder as a command does."""
    with create_output_folder(output) as folder:
        for name in NAMES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)


def list_names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("output", ["new/made", "existing", "link", "."])
def test_an_output_folder_is_new_or_empty(
    output: str, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    for name in ("work", "work/existing"):
        (tmp_path / name).mkdir()
    (tmp_path / "work/link").symlink_to("existing")
    monkeypatch.chdir(tmp_path / "work" if output != "." else tmp_path / "work/existing")
    with pytest.raises(KeyError), create_output_folder(Path(output)) as folder:
        (folder / "model").touch()
        raise KeyError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["existing", "link", "work"]
    write(Path(output))
    assert list_names(Path(output)) == NAMES


def test_a_folder_in_use_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for used in (tmp_path, tmp_path / "file"):
        with raises_one_line(str(used), "not empty", "a different `output`"):
            check_output_is_empty(used)


def test_two_commands_never_write_to_one_folder(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "LOCK_TIMEOUT", 0.1)
    with create_output_folder(tmp_path / "out") as folder:
        with raises_one_line("is in use by another command"):
            write(tmp_path / "out", "second")
        (folder / "config.json").write_text("first")
    assert list_names(tmp_path / "out") == ["config.json"]
    with raises_one_line("exists and is not empty"):
        write(tmp_path / "out", "second")
    assert (tmp_path / "out/config.json").read_text() == "first"


@pytest.mark.skipif(sys.platform == "win32", reason="has other locks")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_to_with_a_warning(
    number: int, tmp_path: Path, monkeypatch: MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning) if number == errno.ENOSYS else nullcontext():
        write(tmp_path / "out")
    assert list_names(tmp_path / "out") == NAMES
    if number != errno.ENOSYS:  # filelock itself has a replacement
        assert "has no locks" in caplog.text


def end_at_change(number: int, folder: Path, work: Callable[[], Any]) -> int:
    """Do some work in another process, which ends before its change `number` of a folder.

    Return the exit status.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    numbers = itertools.count(1)

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in CHANGES and str(arguments[0]).startswith(str(folder))
        if is_change and next(numbers) == number:
            os._exit(KILLED)

    sys.addaudithook(count)
    work()
    os._exit(0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_what_a_killed_command_left_is_replaced_by_the_next_one(tmp_path: Path) -> None:
    """The first process is killed before its first, second, ... change of the folder."""
    for number in itertools.count(1):
        output = tmp_path / str(number)
        output.mkdir()
        status = end_at_change(number, output, lambda output=output: write(output, "killed"))
        if status == 0:
            break
        is_complete = (output / "config.json").is_file()
        if is_complete:
            with raises_one_line("exists and is not empty"):
                write(output, "new")
        else:
            write(output, "new")
        assert set(NAMES) == set(list_names(output)) - {staging.LOCK_FILE}
        assert {(output / name).read_text() for name in NAMES} == {
            "killed" if is_complete else "new"
        }
    assert number > 8


def test_a_folder_that_somebody_handed_over_deletes_nothing(tmp_path: Path) -> None:
    """A hidden list of moved files once named what the next command deletes."""
    thesis = tmp_path / "precious/thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    partial = tmp_path / "shared" / staging.STAGING_FOLDER
    partial.mkdir(parents=True)
    (partial / "a").touch()
    (partial / ".moved").write_text(f"a\n../precious/thesis.txt\n{thesis}\n")
    write(tmp_path / "shared")
    assert thesis.read_text() == "mine"
    assert list_names(tmp_path / "shared") == NAMES


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("I/O error: No space left on device"),
    ],
)
def test_a_full_disk_leaves_no_file(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, create_output_folder(tmp_path / "out"):
        raise error
    assert "no space is left on the device" in describe_error(raised.value)
    assert not list(tmp_path.iterdir())
