"""Features of photos that have passed a frozen encoder, kept by the content of the photo.

    ~/.cache/vitcls/features-1.sqlite3      VITCLS_CACHE names another folder; VITCLS_CACHE=none: nothing is kept

The file belongs to a person: all commands and models share it, only this user can read it, and it never
comes with a data set or a model. A command that is killed loses at most the last second, several
commands may write at a time, and those features that were not used for the longest time are removed first
(`MAX_BYTES`). A row that is damaged counts as missing. Nothing here raises an error: without the file,
everything is computed.

A row is found by the key of the photo (data/images.py; `checksum` in tables) and the key of the pass
(`FrozenEncoder.open_store`).
"""

import hashlib
import os
import sqlite3
import stat
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
STORE_FILE = "features-1.sqlite3"  # The number is that of the table below
MAX_BYTES = 5 * 10**9
TIMEOUT = 10.0  # Seconds to wait for a transaction of another command
SECONDS_BETWEEN_WRITES = 1.0
DIGEST_SIZE = 8
TABLE = """
    CREATE TABLE IF NOT EXISTS features
    (pass BLOB, photo INTEGER, day INTEGER, row BLOB, PRIMARY KEY (pass, photo))
"""
# Of the pages that hold something
COUNT_BYTES = """
    SELECT (page_count - freelist_count) * page_size
    FROM pragma_page_count, pragma_freelist_count, pragma_page_size
"""
REMOVE_OLDEST = """
    DELETE FROM features WHERE rowid IN
    (SELECT rowid FROM features ORDER BY day, rowid LIMIT (SELECT count(*) / 10 + 1 FROM features))
"""


class FeatureStore:
    """What photos have left in passes of one kind, and what they leave in this one.

    Args:
        file: the file, which is created if it is missing.
        key: of the kind of pass.

    Attributes:
        found: keys of the photos that were there.
    """

    def __init__(self, file: Path, key: bytes) -> None:
        self.file = file
        self.key = key
        self.found: list[int] = []
        self.photos: dict[int, int] = {}  # Index of a photo of this pass -> its key
        self.waiting: list[tuple[Any, ...]] = []  # Rows of the table to write
        self.last_write = time.monotonic()
        self.today = int(time.time() // 86_400)
        self.connection: sqlite3.Connection | None = None
        try:
            self.connection = self.open()
        except (sqlite3.Error, OSError) as error:
            self.give_up(error)

    def open(self) -> sqlite3.Connection:
        """Open the file, or create it."""
        self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A named pipe would wait, and a link or a file of somebody else may be anything
        if os.path.lexists(self.file):
            state = self.file.lstat()
            is_own = not hasattr(os, "getuid") or state.st_uid == os.getuid()
            if not (is_own and stat.S_ISREG(state.st_mode) and not state.st_mode & stat.S_IWOTH):
                raise OSError("it is not a file that only you can write")
        self.file.touch(0o600)
        connection = sqlite3.connect(self.file, TIMEOUT, check_same_thread=False)
        connection.execute(TABLE)
        return connection

    def give_up(self, error: Exception) -> None:
        """Go on without the file, and say so once."""
        self.connection = None
        warn_on_first_process(
            f"features of photos are not kept in {self.file}: {format_error(error)}. Remove the file, or set "
            f"{CACHE_VARIABLE} to another folder or to `none`"
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
        if self.connection is None:
            return None
        try:
            found = self.connection.execute(
                "SELECT row, day FROM features WHERE pass = ? AND photo = ?", (self.key, photo)
            ).fetchone()
        except sqlite3.Error as error:
            self.give_up(error)
            return None
        content, day = found or (b"", self.today)
        values = content[:-DIGEST_SIZE]
        if content != self.sign(photo, values):
            return None
        self.found.append(photo)
        if day != self.today:  # It was used again
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
            if photo is not None and np.isfinite(row).all():
                content = self.sign(photo, row.tobytes())
                self.waiting.append((self.key, photo, self.today, content))
        if time.monotonic() - self.last_write > SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting, and remove what was not used for the longest time."""
        waiting, self.waiting = self.waiting, []
        self.last_write = time.monotonic()
        if self.connection is None:
            return
        try:
            with self.connection as connection:
                connection.executemany(
                    "INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?)", waiting
                )
                while connection.execute(COUNT_BYTES).fetchone()[0] > MAX_BYTES:
                    connection.execute(REMOVE_OLDEST)
        except sqlite3.Error as error:
            self.give_up(error)


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
    return f"{file or 'none'} ({size / 1e6:,.0f} MB of at most {MAX_BYTES / 1e6:,.0f})"
