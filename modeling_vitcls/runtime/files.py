"""Read text and JSON, write files atomically, and replace unprintable characters."""

import hashlib
import json
import os
import re
import secrets
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


MAX_ROWS = 10_000_000  # Maximum number of rows of a Parquet file in a model folder
MAX_BYTES = 2**31  # Maximum size of its values in memory, in bytes
UNFINISHED_SUFFIX = ".unfinished"  # Suffix of a hidden file that is not complete
# Control characters, line separators, and what hides text or turns its direction. The joiners U+200C
# and U+200D are parts of words and emoji.
INVISIBLE_CHARACTER = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\U000e0000-\U000e007f]"
)
FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")  # First characters of formulas in spreadsheets


def find_file(path: str) -> str:
    """Find the file of a path that another system wrote: with backslashes, or é in the other Unicode form.

    The path is unchanged if it exists, or if no file is found.
    """
    if (path.isascii() and "\\" not in path) or os.path.lexists(path):
        return path
    found = Path()
    for part in Path(path.replace("\\", "/")).parts:
        # Each folder on its own: a photo of a Mac may be in a folder that Windows named.
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        found = next(
            (found / form for form in forms if os.path.lexists(found / form)), found / part
        )
    return str(found) if os.path.lexists(found) else path


def find_similar_names(path: Path) -> list[str]:
    """Find the files of a folder whose names differ from `path` only in upper and lower case."""
    if not os.path.isdir(path.parent):  # noqa: PTH112  # False for long names
        return []
    name = path.name.lower()
    return sorted(file.name for file in path.parent.iterdir() if file.name.lower() == name)


def read_text(file: Path) -> str:
    """Read the text of a file in UTF-8.

    Raise OSError if it is missing, or not a regular file after links: a named pipe would block, and
    ValueError if it is not UTF-8.
    """
    if file.exists() and not file.is_file():
        raise OSError(f"{file} is not a regular file. Set the path of a file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {file}: it is not UTF-8 text ({error.reason})") from None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raise ValueError if the file does not contain a valid JSON object, and OSError if it cannot be read.
    """
    text = read_text(file)
    try:
        if text.startswith("version https://git-lfs"):
            raise OSError(
                f"{file} is a pointer of Git LFS instead of the file. Run `git lfs pull` in its folder"
            )
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # The text is not JSON, or nested too deeply
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {file}: the file does not contain a JSON object")
    return content


def check_parquet_size(file: Path, types: tuple[str, ...] = ("",)) -> None:
    """Raise ValueError if a Parquet file has more values than memory holds: megabytes may hold many.

    The file stores a text that repeats once, and memory holds it for each row. So the rows are read, few
    at a time, and counted: the columns whose types begin as one of `types`.
    """
    # Imported here: flags are parsed without it.
    from pyarrow.parquet import ParquetFile

    num_bytes = 0
    with ParquetFile(file) as stored:
        num_rows = stored.metadata.num_rows
        fields = stored.schema_arrow
        names = [each.name for each in fields if str(each.type).startswith(types)]
        for batch in stored.iter_batches(1000, columns=names) if num_rows <= MAX_ROWS else ():
            for column in batch.columns:
                if hasattr(column, "dictionary_decode"):
                    column = column.dictionary_decode()
                num_bytes += column.nbytes
            if num_bytes > MAX_BYTES:
                break
    if num_rows > MAX_ROWS or num_bytes > MAX_BYTES:
        raise ValueError(
            f"it has {num_rows:,} rows, which take more than {num_bytes - 1:,} bytes, but at most "
            f"{MAX_ROWS:,} rows and {MAX_BYTES:,} bytes are read"
        )


def replace_control_characters(text: str) -> str:
    """Replace line breaks and tabs with spaces, and other unprintable characters with U+FFFD."""
    text = re.sub(r"\s", " ", text)
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def escape_csv_cell(text: str) -> str:
    """Make a text safe for a CSV cell: one line, which spreadsheets do not run as a formula.

    Control and invisible characters become escape sequences such as \\n. A single quote is put
    before a text that begins with a character of `FORMULA_PREFIXES`, as OWASP recommends against CSV
    injection.
    """
    escaped = INVISIBLE_CHARACTER.sub(
        lambda match: match[0].encode("unicode_escape").decode(), text
    )
    # A text that has a quote there already gets another one, because reading removes one
    is_formula = text.lstrip("'").startswith(FORMULA_PREFIXES)
    return f"'{escaped}" if is_formula else escaped


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object to a file atomically."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text to a file atomically, in UTF-8."""
    with write_atomically(file) as temporary_file:
        temporary_file.write_text(text, encoding="utf-8")


@contextmanager
def write_atomically(file: Path) -> Iterator[Path]:
    """Yield the path of a temporary file to write, and create its folder.

    After the block, rename the temporary file to `file`, or remove the temporary file if an error
    is raised. Raise OSError with `file` in the message if writing fails.

    The name of the temporary file is random, because processes on other hosts may have the same
    process id.
    """
    # The rename below would replace a device such as /dev/null with a file.
    if file.exists() and not file.is_file():
        raise OSError(f"cannot write {file}: it is not a regular file")
    # In the same folder, because a rename replaces a file in one step only within a file system.
    temporary_file = file.with_name(f".{file.name}.{secrets.token_hex(8)}{UNFINISHED_SUFFIX}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield temporary_file
        # Before the rename: after a power failure, the name could belong to an empty file
        sync_to_disk(temporary_file)
        temporary_file.replace(file)
    except OSError as error:
        # Other code in the block may also raise OSErrors, and their messages say more than this
        # one.
        if error.errno is None:
            raise
        raise OSError(f"cannot write {file}: {error.strerror}") from error
    finally:
        temporary_file.unlink(missing_ok=True)
    # The new name of a file is stored in its folder
    sync_to_disk(file.parent)


def sync_to_disk(path: Path) -> None:
    """Flush a file, or the file names in a folder, to disk (fsync).

    Windows has no such call for folders.
    """
    if os.name == "nt" and path.is_dir():
        return
    # Windows flushes a file only if it is open for writing; a folder can be opened only for
    # reading.
    file_descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(file_descriptor)
    finally:
        os.close(file_descriptor)


def compute_json_digest(content: Any) -> str:
    """Hash what JSON can write (SHA-256), independent of its formatting and the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def compute_file_digest(file: Path) -> str:
    """Compute the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
