"""Features of photos that have passed a frozen encoder, kept by the content of the photo.

    ~/.cache/vitcls/features.sqlite3        VITCLS_CACHE names another folder; VITCLS_CACHE=none: nothing is kept

The store belongs to a person: one file for all commands and models, which only this user can read, and
which never comes with a data set or a model. A command that is killed loses at most the last second,
several may write at a time, and without a store everything is computed. Those that were not used for
the longest time are removed first (`MAX_BYTES`). A row that is damaged counts as missing.

Rows are found by the key of the photo (data/images.py, `checksum` in tables) and that of the pass
(`compute_pass_key` in features.py).
"""

import hashlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from ..runtime.errors import format_error, warn_on_first_process
from .inputs import Photo


CACHE_VARIABLE = "VITCLS_CACHE"
STORE_FILE = "features.sqlite3"
MAX_BYTES = 5 * 10**9
APPLICATION_ID = 0x76637463  # In the header of the file, which is of no other program then
FORMAT = 1  # Of the table below
TIMEOUT = 10.0  # Seconds to wait for a transaction of another command
SECONDS_BETWEEN_WRITES = 1.0
TABLE = f"""
    CREATE TABLE IF NOT EXISTS features
    (pass BLOB, photo INTEGER, day INTEGER, digest BLOB, content BLOB, PRIMARY KEY (pass, photo));
    PRAGMA application_id={APPLICATION_ID};
    PRAGMA user_version={FORMAT}
"""
# Of the pages that hold something
COUNT_BYTES = """
    SELECT (page_count - freelist_count) * page_size
    FROM pragma_page_count, pragma_freelist_count, pragma_page_size
"""
# Fields of a configuration that change nothing in the tokens of the encoder
LABEL_FIELDS = {
    *("architectures", "auto_map", "transformers_version", "_name_or_path", "dtype", "torch_dtype"),
    *("id2label", "label2id", "problem_type", "tasks", "head_type", "head_hidden_size"),
    *("distillation_head", "distillation_inference", "extra_heads", "class_statistics"),
    *("distance_threshold", "compute_all_tokens", "mim_loss", "norm_pixel_target", "token_init"),
    *("initializer_range", "use_mask_token"),
}
# Nor do these, unless the model has a pooler whose output is kept
POOLER_FIELDS = {
    *("pooling", "cls_pooling", "pooled_cls_tokens", "pooled_layers", "pooled_norm"),
    *("pooled_activation", "attention_pool_tokens", "attention_pool_heads"),
    *("attention_pool_intermediate_size", "attention_pool_mlp"),
}


class FeatureStore:
    """The file of kept features, open for this process and its threads.

    No method raises an error: what fails is said in one line, once, and the command goes on without it.

    Args:
        file: the file, which is created if it is missing.
        key: of the pass.
        dtype: of the row of a photo, with a field for each tensor.

    Attributes:
        num_read: number of photos that were there.
    """

    def __init__(self, file: Path, key: bytes, dtype: np.dtype) -> None:
        self.file = file
        self.key = key
        self.dtype = dtype
        self.names = dtype.names or ()
        self.num_read = 0
        self.connection: sqlite3.Connection | None = None
        self.lock = Lock()
        self.waiting: list[tuple[Any, ...]] = []  # Rows to write
        self.used: list[tuple[Any, ...]] = []  # Rows that were not used today before
        self.last_write = time.monotonic()
        self.today = int(time.time() // 86_400)
        with self.going_on():
            self.connection = self.open()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Go on without the store after an error."""
        try:
            with self.lock:
                yield
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            self.connection = None
            warn_on_first_process(
                f"features of photos are not kept in {self.file}: {format_error(error)}. Remove the file, or "
                f"set {CACHE_VARIABLE} to another folder or to `none`"
            )

    def open(self) -> sqlite3.Connection:
        """Open the file, or create it."""
        file, folder = self.file, self.file.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            file.touch(0o600, exist_ok=False)
        # A named pipe would wait, a link leads elsewhere, and what others write may be anything
        if not stat.S_ISREG(file.lstat().st_mode):
            raise ValueError("it is not a regular file")
        for path in (folder, file):
            state = path.stat()
            is_own = not hasattr(os, "geteuid") or state.st_uid == os.geteuid()
            if not is_own or state.st_mode & stat.S_IWOTH:
                raise ValueError(f"others can write to {path}")
        connection = sqlite3.connect(
            f"{file.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=TIMEOUT,
            isolation_level="IMMEDIATE",
            check_same_thread=False,
        )
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            connection.executescript(f"BEGIN IMMEDIATE; {TABLE}; COMMIT")
        found = connection.execute(
            "SELECT application_id, user_version FROM pragma_application_id, pragma_user_version"
        ).fetchone()
        if found != (APPLICATION_ID, FORMAT):
            raise ValueError("it is of another program, or of another version of this one")
        return connection

    def read(self, photo: int) -> np.ndarray | None:
        """Read the row of a photo, from any thread; None if it is missing or damaged."""
        with self.going_on():
            if self.connection is None:
                return None
            row = self.connection.execute(
                "SELECT digest, content, day FROM features WHERE pass = ? AND photo = ?",
                (self.key, photo),
            ).fetchone()
            if row is None or row[0] != self.compute_digest(photo, row[1]):
                return None
            if row[2] != self.today:
                self.used.append((self.today, self.key, photo))
            self.num_read += 1
            return np.frombuffer(row[1], self.dtype)
        return None

    def restore(self, photos: Sequence[Photo], device: torch.device) -> dict[str, torch.Tensor]:
        """Restore what photos have left from their rows."""
        rows = np.concatenate([photo.row for photo in photos])
        return {name: torch.tensor(rows[name], device=device) for name in self.names}

    def write(self, photos: Sequence[Photo], states: Mapping[str, torch.Tensor]) -> None:
        """Keep what photos with a key have left, soon, unless it is not finite."""
        rows = np.zeros(len(photos), self.dtype)
        for name in self.names:
            rows[name] = states[name][: len(photos)].cpu().numpy()
        for photo, row in zip(photos, rows, strict=True):
            if photo.key is not None and all(np.isfinite(row[name]).all() for name in self.names):
                content = row.tobytes()
                digest = self.compute_digest(photo.key, content)
                self.waiting.append((self.key, photo.key, self.today, digest, content))
        if time.monotonic() - self.last_write > SECONDS_BETWEEN_WRITES:
            self.flush()

    def compute_digest(self, photo: int, content: Any) -> bytes:
        """Compute the digest of a row, which a damaged or exchanged one does not have."""
        return hashlib.blake2b(b"%b %d %b" % (self.key, photo, content), digest_size=8).digest()

    def flush(self) -> None:
        """Write what is waiting, and remove the photos that were not used for the longest time."""
        with self.going_on():
            waiting, self.waiting = self.waiting, []
            used, self.used = self.used, []
            self.last_write = time.monotonic()
            if self.connection is None or not (waiting or used):
                return
            with self.connection as connection:
                connection.executemany(
                    "INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?, ?)", waiting
                )
                connection.executemany(
                    "UPDATE features SET day = ? WHERE pass = ? AND photo = ?", used
                )
                while connection.execute(COUNT_BYTES).fetchone()[0] > MAX_BYTES:
                    connection.execute(
                        "DELETE FROM features WHERE rowid IN (SELECT rowid FROM features ORDER BY day, "
                        "rowid LIMIT (SELECT count(*) / 10 + 1 FROM features))"
                    )


def find_store_file() -> Path | None:
    """Find the place of the store; None if nothing is kept."""
    folder = os.environ.get(CACHE_VARIABLE) or "~/.cache/vitcls"
    if folder == "none":
        return None
    return Path(os.path.expanduser(folder), STORE_FILE)  # noqa: PTH111  # Without errors


def describe_store() -> str:
    """Say where features are kept, and how many bytes they take."""
    file = find_store_file()
    if file is None:
        return f"none ({CACHE_VARIABLE}=none)"
    size = file.stat().st_size if file.is_file() else 0
    return f"{file} ({size / 1e6:,.0f} MB of at most {MAX_BYTES / 1e6:,.0f})"
