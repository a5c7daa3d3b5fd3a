"""The table of `predict`: what a person has edited is never lost, and what has changed is said.

    labels.csv                 the table, which is written when all its rows are there
    labels.edited.csv          what a person has made of it, after `overwrite`
    labels.changed.csv         the labels that changed when the table was last replaced
    .labels.csv.written        digests of the tables that `predict` has written there
    .labels.csv.unfinished     folder with the rows of a running command, which its processes append

The features of the photos are kept elsewhere (feature_store.py), so rows are computed again each time.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..runtime.errors import warn_on_first_process
from ..runtime.files import (
    UNFINISHED_SUFFIX,
    compute_file_digest,
    escape_csv_cell,
    read_text,
    write_atomically,
)
from ..runtime.staging import lock_folder
from .outputs import ROWS_PER_GROUP, Columns, Writer
from .prediction_rows import Row


# Columns that are returned after the table is written
SUMMARY = "index image label probability distance unknown checksum trained error".split()
NUM_DIGESTS = 20  # Number of earlier tables that are known as written by `predict`


class OutputTable:
    """The file of a table.

    Args:
        file: its path.
        columns: its columns and their types.
        write: writes it, one of `WRITERS`.
        edit: changes the values of a part of the table, or adds columns, before it is written.
    """

    def __init__(
        self,
        file: Path,
        columns: Columns,
        write: Writer,
        edit: Callable[[pa.Table], pa.Table] = lambda table: table,
    ) -> None:
        self.file = file
        self.edit = edit
        self.schema = pa.schema(list(columns.items()))
        self.write_file = write
        self.digest_file = file.with_name(f".{file.name}.written")
        self.parts = file.with_name(f".{file.name}{UNFINISHED_SUFFIX}")

    # Start ------------------------------------------------------------------------------------

    def read_digests(self) -> list[str]:
        """Read the digests of the tables that were written here; none if the file is unusual."""
        if self.digest_file.is_symlink():
            return []
        with suppress(OSError, ValueError):
            return read_text(self.digest_file).split()
        return []

    @property
    def is_edited(self) -> bool:
        """Whether the file is there, and not as `predict` has written it."""
        return self.file.exists() and compute_file_digest(self.file) not in self.read_digests()

    def check(self, overwrite: bool) -> None:
        """Raise ValueError if the file is not as `predict` has written it, unless `overwrite` is set."""
        if not overwrite and self.is_edited:
            raise ValueError(
                f"{self.file} exists, and is not what `predict` has written there. Rename it, set "
                "another `output`, or set `overwrite`, which keeps it beside"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other commands from this table, and remove what a killed one has left."""
        if self.parts.is_symlink():
            raise ValueError(f"{self.parts} is a link. Remove it")
        with lock_folder(self.parts, "output"):
            self.remove_parts()
            try:
                yield
            finally:
                self.remove_parts()
        with suppress(OSError):
            self.parts.rmdir()
        for remainder in self.file.parent.glob(f".{escape(self.file.name)}.*{UNFINISHED_SUFFIX}"):
            remainder.unlink(missing_ok=True)  # Of a run that was killed while it wrote the table

    def remove_parts(self) -> None:
        for part in self.parts.glob("*.arrow"):
            part.unlink()

    # Rows -------------------------------------------------------------------------------------

    def append(self, name: str, rows: Iterator[Row], batch_size: int) -> None:
        """Write the rows of a process to a part with this name, while they are computed."""
        file = str(self.parts / f"{name}.arrow")
        with pa.OSFile(file, "wb") as stream, pa.ipc.new_stream(stream, self.schema) as writer:
            while batch := list(islice(rows, batch_size)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, self.schema))

    def write(self, num_rows: int) -> pa.Table:
        """Write the table of all parts, and return what the model says, without features.

        Raises:
            OSError: if rows are missing, because the processes do not share a file system.
        """
        places = {}
        for part in sorted(self.parts.glob("*.arrow")):
            for batch in pa.ipc.open_stream(pa.memory_map(str(part))):
                for position, index in enumerate(batch["index"].to_pylist()):
                    places[index] = (batch, position)
        if len(places) < num_rows:
            raise OSError(
                f"{self.parts} lacks {num_rows - len(places):,} of {num_rows:,} rows. The processes "
                "require one file system: set `output` to a file there"
            )
        summaries = []

        def build_tables() -> Iterator[pa.Table]:
            for start in range(0, num_rows, ROWS_PER_GROUP):
                group = range(num_rows)[start : start + ROWS_PER_GROUP]
                rows = [places[index][0].slice(places[index][1], 1) for index in group]
                # A chunk for each row would take kilobytes
                table = pa.Table.from_batches(rows, self.schema).combine_chunks()
                summaries.append(table.select(returned))
                yield self.edit(table)

        returned = [name for name in self.schema.names if name in SUMMARY]
        schema = self.edit(self.schema.empty_table()).schema
        with write_atomically(self.file) as file:
            self.write_file(build_tables(), schema, file)
            self.compare(file)
            self.keep_edited()
            # Both are known: the table that is there may be in use, so that it cannot be replaced
            digests = self.read_digests()[:NUM_DIGESTS]
            if self.file.exists() and not self.is_edited:
                digests.insert(0, compute_file_digest(self.file))
            digests.insert(0, compute_file_digest(file))
            with write_atomically(self.digest_file) as digest_file:
                digest_file.write_text("\n".join(dict.fromkeys(digests)), encoding="utf-8")
        return pa.concat_tables(summaries)

    def keep_edited(self) -> None:
        """Move a table that a person has edited beside its place."""
        if self.is_edited:
            number = 1
            while (
                kept := self.name_beside("edited" + (f"-{number}" if number > 1 else ""))
            ).exists():
                number += 1
            shutil.copy2(self.file, kept)
            print(f"{kept}: the table as you have edited it")

    def name_beside(self, word: str) -> Path:
        return self.file.with_name(f"{self.file.stem}.{word}{self.file.suffix}")

    # Changes ----------------------------------------------------------------------------------

    def compare(self, new_file: Path) -> None:
        """Say how many labels a new table changes, and which photos of the earlier one it lacks."""
        if not self.file.exists():
            return
        before, after = (read_labels(file, self.file.suffix) for file in (self.file, new_file))
        if before is None:
            return
        is_lost = ~before.index.isin(after.index) & ~before["image"].isin(after["image"])
        if is_lost.any():
            warn_on_first_process(
                f"left out of {self.file}: {is_lost.sum():,} of its earlier photos, which are not among these, "
                f"such as {before['image'][is_lost].iloc[0]}"
            )
        names = before.columns.intersection(after.columns).drop("image")
        before, after = before.align(after, join="inner", axis=0)
        changes = before[names].compare(after[names], align_axis=0)
        if len(changes):
            file = self.file.with_name(f"{self.file.stem}.changed.csv")
            changes = changes.rename_axis(["checksum", "table"])
            changes.insert(0, "image", after["image"].reindex(changes.index, level="checksum"))
            with write_atomically(file) as temporary_file:
                changes.rename({"self": "before", "other": "after"}).to_csv(temporary_file)
            print(f"{len(changes) // 2:,} labels changed: {file}")


def read_labels(file: Path, suffix: str) -> Any:
    """Read a table with the name and the labels of each photo, by its checksum; None if it has none."""
    import pandas as pd  # Slow to import

    readers: dict[str, Callable[..., Any]] = {
        ".parquet": pd.read_parquet,
        ".csv": partial(pd.read_csv, sep=None, engine="python", keep_default_na=False),
        ".json": partial(pd.read_json, dtype=False),
        ".jsonl": partial(pd.read_json, dtype=False, lines=True),
    }
    try:
        table = readers[suffix.lower()](file)
        table = table.drop_duplicates("checksum").set_index("checksum")
    except (OSError, ValueError, KeyError, AttributeError):
        return None  # What a person has put there
    # The label of a task, not `label_2`
    return table.filter(regex="^(image|(.+_)?labels?)$").map(
        lambda value: escape_csv_cell(str(value))
    )
