"""Read JSON, write files completely or not at all, and show text from files."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: If the file is not valid JSON, or is not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {file}: it does not contain a JSON object")
    return content


def replace_control_characters(text: str) -> str:
    """Return text in one line, with control characters and invalid bytes of file names replaced."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "\ufffd" for char in text)


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A hidden file to write, which becomes `file` once it is complete and on disk, or is removed.

    Raises:
        OSError: naming `file`, if it cannot be written.
    """
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(file)
    except OSError as error:
        if error.errno is None:  # of what is to be written, rather than of writing it
            raise
        raise OSError(f"cannot write {file}: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name as well
    finally:
        os.close(folder)
