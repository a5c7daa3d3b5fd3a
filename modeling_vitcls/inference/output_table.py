"""The table of `predict`: what a person has edited is never lost.

    labels.csv                 the table, which is written when all its rows are there
    labels.edited.csv          what a person has made of it, after `overwrite`
    .labels.csv.written        digests of the tables that `predict` has written there
    .labels.csv.unfinished     folder with the rows of a running command, which its processes append

The features of the photos are kept elsewhere (feature_store.py), so rows are computed again each time.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from itertools import islice
from pathlib import Path

import pyarrow as pa

from ..runtime.files import (
    UNFINISHED_SUFFIX,
    compute_file_digest,
    read_text,
    write_atomically,
)
from ..runtime.staging import lock_folder
from .outputs import ROWS_PER_GROUP, Columns, Writer
from .prediction_rows import Row


NUM_DIGESTS = 100  # Number of earlier tables that are known as written by `predict`


class OutputTable:
    """The file of a table.

    Args:
        file: its path.
        columns: its columns and their types.
        write: writes it, one of `WRITERS`.
    """

    def __init__(self, file: Path, columns: Columns, write: Writer) -> None:
        self.file = file
        self.schema = pa.schema(list(columns.items()))
        self.write_file = write
        self.digest_file = file.with_name(f".{file.name}.written")
        self.parts = file.with_name(f".{file.name}{UNFINISHED_SUFFIX}")

    # Start ------------------------------------------------------------------------------------

    def read_digests(self) -> list[str]:
        """Read the digests of the tables that were written here; none if the file is unusual."""
        with suppress(OSError, ValueError):
            if not self.digest_file.is_symlink():
                return read_text(self.digest_file).split()
        return []

    @property
    def is_edited(self) -> bool:
        """Whether the file is there, and not as `predict` has written it."""
        return self.file.exists() and compute_file_digest(self.file) not in self.read_digests()

    @contextmanager
    def lock(self, overwrite: bool) -> Iterator[None]:
        """Keep other commands from this table, and remove what a killed one has left.

        Raise ValueError if the file is not as `predict` has written it, unless `overwrite` is set.
        """
        if self.parts.is_symlink():
            raise ValueError(f"{self.parts} is a link. Remove it")
        with lock_folder(self.parts, "output"):
            self.remove_parts()
            if not overwrite and self.is_edited:
                raise ValueError(
                    f"{self.file} exists, and is not what `predict` has written there. Rename it, set "
                    "another `output`, or set `overwrite`, which keeps it beside"
                )
            try:
                yield
            finally:
                self.remove_parts()
        with suppress(OSError):
            self.parts.rmdir()

    def remove_parts(self) -> None:
        """Remove rows, and tables of runs that were killed while they wrote them."""
        tables = self.file.parent.glob(f".{escape(self.file.name)}.*{UNFINISHED_SUFFIX}")
        for file in (*self.parts.glob("*.arrow"), *tables):
            file.unlink(missing_ok=True)

    # Rows -------------------------------------------------------------------------------------

    def append(self, name: str, rows: Iterator[Row], batch_size: int) -> None:
        """Write the rows of a process to a part with this name, while they are computed."""
        file = str(self.parts / f"{name}.arrow")
        with pa.OSFile(file, "wb") as stream, pa.ipc.new_stream(stream, self.schema) as writer:
            while batch := list(islice(rows, batch_size)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, self.schema))

    def write(self, num_rows: int) -> list[Row]:
        """Write the table of all parts, and return the index, `trained` and `error` of each image.

        Raises:
            OSError: if rows are missing, because the processes do not share a file system.
        """
        batches: list[pa.RecordBatch] = []
        for part in self.parts.glob("*.arrow"):
            batches += pa.ipc.open_stream(pa.memory_map(str(part)))
        # Each has adjacent rows: the processes take whole batches in turn
        batches.sort(key=lambda batch: batch["index"][0].as_py())
        table = pa.Table.from_batches(batches, self.schema)
        if len(table) < num_rows:
            raise OSError(
                f"{self.parts} lacks {num_rows - len(table):,} of {num_rows:,} rows. The processes "
                "require one file system: set `output` to a file there"
            )
        starts = range(0, num_rows, ROWS_PER_GROUP)
        groups = (table.slice(start, ROWS_PER_GROUP).combine_chunks() for start in starts)
        with write_atomically(self.file) as file:
            self.write_file(groups, self.schema, file)
            if self.is_edited:
                kept = self.file
                while kept.exists():
                    kept = kept.with_stem(f"{kept.stem}.edited")
                shutil.copy2(self.file, kept)
                print(f"{kept}: the table as you have edited it")
            # Earlier ones stay known: the table that is there may be in use, and is not replaced then
            digests = dict.fromkeys([compute_file_digest(file), *self.read_digests()])
            with write_atomically(self.digest_file) as digest_file:
                digest_file.write_text("\n".join([*digests][:NUM_DIGESTS]), encoding="utf-8")
        return table.select(["index", "trained", "error"]).to_pylist()  # type: ignore[no-any-return]
