"""Read JSON, write files atomically, make text from files printable, and detect closed pipes."""

import json
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: If the file is not valid JSON, or does not contain an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {file}: the file does not contain a JSON object")
    return content


def replace_control_characters(text: str) -> str:
    """Return text as a single line, with control characters and invalid bytes of file names replaced."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "\ufffd" for char in text)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file completely or not at all.

    Raises:
        OSError: If the file cannot be written.
    """
    with write_atomically(file) as unfinished_file:
        unfinished_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def write_atomically(file: Path) -> Iterator[Path]:
    """Yield the path of a hidden file for writing. After the block, rename the hidden file to `file`, or remove the
    hidden file if an error was raised.

    Raises:
        OSError: If the file cannot be written. The message contains `file`.
    """
    unfinished_file = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished_file
        with unfinished_file.open("rb") as stream:
            os.fsync(stream.fileno())
        unfinished_file.replace(file)
    except OSError as error:
        if error.errno is None:  # raised while the content was computed, not by a write operation
            raise
        raise OSError(f"cannot write {file}: {error.strerror}") from error
    finally:
        unfinished_file.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # writes the new name to the disk
    finally:
        os.close(folder)


def is_closed_pipe(stream: TextIO) -> bool:
    """Flush a stream, and return whether the stream is a pipe that the reader has closed."""
    poller = select.poll()
    try:
        stream.flush()
        poller.register(stream, 0)
    except BrokenPipeError:
        return True
    except (OSError, ValueError):  # the stream is closed or has no file descriptor
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))
