"""Features of photos that have passed a frozen encoder, kept by the content of the photo.

    ~/.cache/vitcls/features-1.sqlite3      VITCLS_CACHE names another folder; VITCLS_CACHE=none: nothing is kept

The file belongs to a person: all commands and models share it, it never comes with a data set or a
model, and it is used only if nobody else can write it, the files that SQLite puts beside it, and the folder.
A row that is not exactly what was written counts as missing. Nothing here raises an error:

    killed          a command loses at most the last second
    locked, no space on the disk    rows wait, and are tried again with the next ones
    full            the oldest rows of other passes, and those that 30 days have not used, are removed
                    first, a few at a time; then a pass says how many photos it could not keep
                    (`VITCLS_CACHE_SIZE`)
    damaged         everything is computed, after one line

A row is found by the key of the photo (data/images.py; `checksum` in tables) and the key of the pass
(`FrozenEncoder.open_store`).
"""

import hashlib
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.images import compute_key
from ..runtime.errors import format_error, warn_on_first_process


CACHE_VARIABLE = "VITCLS_CACHE"
SIZE_VARIABLE = "VITCLS_CACHE_SIZE"
STORE_FILE = "features-1.sqlite3"  # The number is that of the table below
SIDE_FILES = ("-journal", "-wal", "-shm")  # SQLite reads them into the file
MAX_BYTES = 5 * 10**9
TIMEOUT = 10.0  # Seconds to wait for a transaction of another command
SHORT_TIMEOUT = 0.1  # After that, until the first transaction that succeeds
SECONDS_BETWEEN_WRITES = 1.0
MAX_WAITING = 10_000  # Rows; 250 MB of a ViT-S. Those of later photos are not kept
DIGEST_SIZE = 8
FILE_ERRORS = (sqlite3.Error, UnicodeError)  # A damaged schema has other bytes than text
# Errors that pass: the rows are tried again
PASSING_ERRORS = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)
TABLE = """
    CREATE TABLE IF NOT EXISTS features
    (pass BLOB, photo INTEGER, day INTEGER, row BLOB, PRIMARY KEY (pass, photo))
"""
INDEX = "CREATE INDEX IF NOT EXISTS days ON features (day, pass)"
# Of the pages that hold something
COUNT_BYTES = """
    SELECT (page_count - freelist_count) * page_size
    FROM pragma_page_count, pragma_freelist_count, pragma_page_size
"""
# Rows of the future, from a clock that was ahead, would otherwise never be the oldest
END_FUTURE = "UPDATE features SET day = 0 WHERE day > ?"
REMOVE_OLDEST = """
    DELETE FROM features WHERE rowid IN
    (SELECT rowid FROM features WHERE pass != ? OR day < ? ORDER BY day, rowid LIMIT 20)
"""
REMOVE_ONE = "DELETE FROM features WHERE pass = ? AND photo = ?"
UNUSED_DAYS = 30  # After which a pass removes rows of its own kind, too
MAX_REMOVALS = 100  # Of 20 rows each, in one transaction
SAID: set[tuple[Path, str]] = set()  # In this process
SAID_LOCK = threading.Lock()  # Threads read


class FeatureStore:
    """What photos have left in passes of one kind, and what they leave in this one.

    Args:
        file: the file, which is created if it is missing.
        key: of the kind of pass.
        num_values: number of values of a row; any by default.

    Attributes:
        found: keys of the photos that were there.
    """

    def __init__(self, file: Path, key: bytes, num_values: int | None = None) -> None:
        self.file = file
        self.key = key
        self.num_values = num_values
        self.found: list[int] = []
        self.photos: dict[int, int] = {}  # Index of a photo of this pass -> its key
        self.waiting: list[tuple[Any, ...]] = []  # Rows of the table to write
        self.num_kept = 0  # New rows
        self.num_refused = 0  # New rows for which there is no place
        self.num_dropped = 0  # New rows that would have waited for too long
        self.last_write = time.monotonic()
        self.today = int(time.time() // 86_400)
        self.connection: sqlite3.Connection | None = None
        try:
            self.connection = self.open()
        except (*FILE_ERRORS, OSError) as error:
            self.give_up(error)

    def open(self) -> sqlite3.Connection:
        """Open the file, or create it."""
        self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_is_own(self.file.parent.resolve(), stat.S_ISDIR)
        # A named pipe would wait, and a link or a file of somebody else may be anything
        for suffix in ("", *SIDE_FILES):
            path = self.file.with_name(self.file.name + suffix)
            if os.path.lexists(path):
                check_is_own(path, stat.S_ISREG)
        self.file.touch(0o600)
        if hasattr(os, "getuid"):
            self.file.chmod(0o600)
        connection = sqlite3.connect(self.file, TIMEOUT, check_same_thread=False)
        connection.text_factory = bytes  # A damaged row may be any text
        try:
            connection.execute(TABLE)
            connection.execute(INDEX)
        except FILE_ERRORS as error:
            if not is_passing(error):
                raise
            self.wait(connection, error)
        return connection

    def give_up(self, error: Exception) -> None:
        """Go on without the file, and say so once."""
        self.connection = None
        self.say(f"{format_error(error)}. Remove the file, or set")

    def wait(self, connection: sqlite3.Connection, error: Exception) -> None:
        """Keep the rows until the next attempt, and say so once."""
        connection.execute(f"PRAGMA busy_timeout = {SHORT_TIMEOUT * 1000:.0f}")
        self.say(
            f"{format_error(error)}. They are tried again. To keep them elsewhere, set", " for now"
        )

    def say(self, message: str, addition: str = "") -> None:
        """Say why the file is not used."""
        say_once(
            self.file,
            "unused",
            f"features of photos are not kept in {self.file}{addition}: {message} {CACHE_VARIABLE} to "
            "another folder or to `none`",
        )

    def prepare(self, index: int, image: Any, decode: Callable[[], Any]) -> Any:
        """Return what a photo has left, [F], or else what `decode` returns; called by threads.

        Args:
            index: of the photo in this pass.
            image: the path or the encoded image; others, such as arrays, have no key.
            decode: returns the pixels [C, H, W], or why the photo is unreadable.
        """
        photo = compute_key(image)
        if photo is None:
            return decode()
        if (row := self.read(photo)) is not None:
            return row
        pixels = decode()
        # A file that changes while it is read is of no known content
        if compute_key(image) == photo:
            self.photos[index] = photo
        return pixels

    def read(self, photo: int) -> Tensor | None:
        """Read what a photo has left, [F]; None if it is missing or damaged."""
        connection = self.connection
        if connection is None:
            return None
        try:
            found = connection.execute(
                "SELECT row, day FROM features WHERE pass = ? AND photo = ?", (self.key, photo)
            ).fetchone()
        except FILE_ERRORS as error:
            if is_passing(error):
                self.wait(connection, error)
            else:
                self.give_up(error)
            return None
        content, day = found or (None, None)
        if not isinstance(content, bytes):
            return None
        values = content[:-DIGEST_SIZE]
        has_size = self.num_values in (None, len(values) / 4)
        if not (values and has_size and content == self.sign(photo, values)):
            return None
        self.found.append(photo)
        # It was used again
        if day != self.today and len(self.waiting) < MAX_WAITING:
            self.waiting.append((self.key, photo, self.today, content))
        return torch.frombuffer(bytearray(values), dtype=torch.float32)

    def sign(self, photo: int, values: bytes) -> bytes:
        """Append the digest that values have only in this row."""
        key = b"%b %d" % (self.key, photo)
        return values + hashlib.blake2b(values, digest_size=DIGEST_SIZE, key=key).digest()

    def write(self, indices: Sequence[int], rows: Tensor) -> None:
        """Keep the rows [B, F] of photos of this pass, soon; without those that are not finite."""
        for index, row in zip(
            indices, rows.float().cpu().numpy(), strict=False
        ):  # Others are padding
            photo = self.photos.pop(index, None)
            if photo is None or not np.isfinite(row).all():
                continue
            if self.num_refused:
                self.num_refused += 1
                continue
            if len(self.waiting) >= MAX_WAITING:
                self.num_dropped += 1
                continue
            content = self.sign(photo, row.tobytes())
            self.waiting.append((self.key, photo, self.today, content))
            self.num_kept += 1
        if time.monotonic() - self.last_write > SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting, and remove what was not used for the longest time, if there is no place."""
        self.last_write = time.monotonic()
        connection = self.connection
        if connection is None or not self.waiting:
            return
        waiting = self.waiting[:]  # Threads append
        try:
            with connection:
                connection.execute(TABLE)
                known = self.find_known(connection, waiting)
                connection.executemany(
                    "INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?)", waiting
                )
                num_refused = self.make_place(
                    connection, [row[1] for row in waiting if row[1] not in known]
                )
            connection.execute(f"PRAGMA busy_timeout = {TIMEOUT * 1000:.0f}")
        except FILE_ERRORS as error:
            if is_passing(error):
                self.wait(connection, error)
            else:
                self.give_up(error)
            return
        del self.waiting[: len(waiting)]
        self.num_refused += num_refused
        self.num_kept -= num_refused

    def find_known(self, connection: sqlite3.Connection, rows: list[tuple[Any, ...]]) -> set[int]:
        """Find the photos of rows that the file has already."""
        query = "SELECT 1 FROM features WHERE pass = ? AND photo = ?"
        return {row[1] for row in rows if connection.execute(query, row[:2]).fetchone()}

    def make_place(self, connection: sqlite3.Connection, new_photos: list[int]) -> int:
        """Remove old rows of other passes, and then new ones of this one; return the number of these."""
        limit = get_max_bytes()

        def is_full() -> bool:
            return bool(connection.execute(COUNT_BYTES).fetchone()[0] > limit)

        if not is_full():
            return 0
        connection.execute(END_FUTURE, (self.today,))
        for _ in range(MAX_REMOVALS):
            if not connection.execute(REMOVE_OLDEST, (self.key, self.today - UNUSED_DAYS)).rowcount:
                break
            if not is_full():
                return 0
        else:
            return 0  # The next transaction goes on
        num_refused = 0
        while new_photos and is_full():
            connection.execute(REMOVE_ONE, (self.key, new_photos.pop()))
            num_refused += 1
        return num_refused

    def close(self) -> None:
        """Write what is waiting at the end of a pass, and say how many photos could not be kept."""
        if self.connection is None:
            return
        self.connection.execute(f"PRAGMA busy_timeout = {TIMEOUT * 1000:.0f}")
        self.flush()
        new = {row[1] for row in self.waiting}.difference(self.found)
        if num_lost := self.num_dropped + len(new):
            say_once(
                self.file,
                "late",
                f"the features of {num_lost:,} photos are not kept, because {self.file} could not be "
                "written for too long. The next run computes them again",
            )
        if self.num_refused:
            num_kept = len(self.found) + self.num_kept
            say_once(
                self.file,
                "full",
                f"the store of features is full: {num_kept:,} of {num_kept + self.num_refused:,} photos are kept "
                f"in {self.file}. Set {SIZE_VARIABLE} to more than {get_max_bytes() / 1e9:g} (GB)",
            )


def say_once(file: Path, fact: str, message: str) -> None:
    """Say one line about each fact of a file, whatever the number of passes and threads of a run."""
    with SAID_LOCK:
        is_new = (file, fact) not in SAID
        SAID.add((file, fact))
    if is_new:
        warn_on_first_process(message)


def check_is_own(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Raise OSError unless a file or folder is of a kind, and only this user can write it."""
    state = path.lstat()
    if not is_kind(state.st_mode):
        raise OSError(f"{path.name} is a link or another kind of file")
    if not hasattr(os, "getuid"):
        return
    if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"others can write {path}")


def is_passing(error: Exception) -> bool:
    """Tell whether a file can be used again later: it is locked, or the disk is full."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in PASSING_ERRORS


def get_max_bytes() -> float:
    """Get the size of the file: `VITCLS_CACHE_SIZE` in GB, 5 by default."""
    try:
        return max(0.0, float(os.environ[SIZE_VARIABLE])) * 1e9
    except (KeyError, ValueError):
        return MAX_BYTES


def find_store_file() -> Path | None:
    """Find the place of the store; None if nothing is kept."""
    folder = os.environ.get(CACHE_VARIABLE) or "~/.cache/vitcls"
    if folder == "none":
        return None
    return Path(os.path.expanduser(folder), STORE_FILE)  # noqa: PTH111  # Without errors


def describe_store() -> str:
    """Say where features are kept, and how many bytes they take."""
    file = find_store_file()
    size = file.stat().st_size if file and file.is_file() else 0
    return f"{file or 'none'} ({size / 1e6:,.0f} MB of at most {get_max_bytes() / 1e6:,.0f})"
