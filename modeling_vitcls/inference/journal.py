"""The journal of a table of predictions: rows are kept as they are computed, so a run can continue.

    labels.csv                  the table, which is written when all its rows are there
    .labels.csv.journal/
        settings.json           the model and the settings that the rows depend on
        TIME-PROCESS.arrow      the rows of one process of a run, batch by batch
        table.json              digests of the tables that were written, and which images they lack

A stream of Arrow can be read at any moment: a last batch that was cut off, by a signal or a loss of
power, is computed again. A photo is known by path, size and time, or else by its content, so a renamed
photo is known, and a photo that was replaced under its name is not.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from ..runtime.files import (
    UNFINISHED_SUFFIX,
    compute_file_digest,
    read_json,
    write_atomically,
    write_json,
)
from .inputs import ImageRecord, compute_checksum
from .outputs import ROWS_PER_GROUP, Columns, Writer
from .prediction_rows import Row


SETTINGS_FILE = "settings.json"
TABLE_FILE = "table.json"
FILE_COLUMNS: Columns = {"path": pa.binary(), "size": pa.int64(), "time": pa.int64()}
# Columns that are returned after the table is written
SUMMARY = "index image label probability distance unknown checksum trained error".split()


class FileState(NamedTuple):
    """Path, size and time of a file, by which it is recognized without reading it."""

    path: bytes | None  # None: the image has no file
    size: int | None
    time: int | None  # Time of modification in ns


class JournalRow(NamedTuple):
    """A row in the journal: where it is, and which image it is of."""

    batch: pa.RecordBatch
    position: int
    file: FileState
    checksum: str | None


def read_file_state(content: Any) -> FileState:
    """Read the state of the file of an image; an image without a file has none."""
    if not isinstance(content, str):
        return FileState(None, None, None)
    with suppress(OSError, ValueError):  # No file, such as a data URI
        status = os.stat(content)  # noqa: PTH116
        path = os.fsencode(os.path.abspath(content))  # noqa: PTH100
        return FileState(path, status.st_size, status.st_mtime_ns)
    return FileState(content.encode(errors="surrogateescape"), None, None)


@dataclass(frozen=True)
class Known:
    """What a journal has of the images of an input.

    Attributes:
        rows: index of an image -> its row.
        missing: index of an image without a row -> its file before it is read, in order; those that
            had an error come last.
        left_out: name and checksum of the other rows: of images that are not in the input, or that have
            been replaced.
        lost: names of the images in the table that are not in the input.
    """

    rows: dict[int, JournalRow]
    missing: dict[int, FileState]
    left_out: list[tuple[str, str | None]]
    lost: list[str]


class Journal:
    """The journal of a table.

    Args:
        table: the file of the table.
        columns: its columns and their types.
        write: writes it, one of `WRITERS`.
    """

    def __init__(self, table: Path, columns: Columns, write: Writer) -> None:
        self.table = table
        self.write = write
        self.folder = table.with_name(f".{table.name}.journal")
        self.schema = pa.schema(list((columns | FILE_COLUMNS).items()))

    # Start ------------------------------------------------------------------------------------

    def start(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Check that the rows of the journal and the table may be continued.

        Raises:
            ValueError: unless `overwrite`, if the rows are of another model or other settings, or
                the table is not as `predict` has written it.
        """
        settings |= {"list of columns": self.schema.names}  # differs between versions
        written = self.read_table_record()["digests"]
        if self.table.exists() and not overwrite and compute_file_digest(self.table) not in written:
            raise ValueError(
                f"{self.table} exists, and is not what `predict` has written there. Rename it, set "
                "another `output`, or set `overwrite` to replace it"
            )
        file = self.folder / SETTINGS_FILE
        if file.exists():
            earlier = {}
            try:
                earlier = read_json(file)
            except ValueError as error:
                if not overwrite:
                    remedy = "Set another `output`, or set `overwrite` to compute it again"
                    raise ValueError(f"{error}. {remedy}") from error
            names = [name for name in settings if earlier.get(name) != settings[name]]
            if names and not overwrite:
                raise ValueError(
                    f"{self.table} was computed with another {', another '.join(names)}. Set another "
                    "`output`, or set `overwrite` to compute it again"
                )
            if names:
                for part in self.folder.glob("*.arrow"):
                    part.unlink()
        write_json(file, settings)

    def read_table_record(self) -> dict[str, Any]:
        """Read which tables were written: the digests of the last two, and the rows left out."""
        record: dict[str, Any] = {"digests": [], "left_out": []}
        with suppress(OSError, ValueError):  # Without it, no table is known
            record |= read_json(self.folder / TABLE_FILE)
        return record

    # Rows -------------------------------------------------------------------------------------

    def read_batches(self, run: str = "") -> Iterator[pa.RecordBatch]:
        """Read the complete batches, of all runs or of one, without copying them to memory."""
        for file in sorted(self.folder.glob(f"{run}*.arrow")):
            with suppress(pa.ArrowInvalid, OSError):  # It is empty, or its last batch was cut off
                for batch in pa.ipc.open_stream(pa.memory_map(str(file))):
                    batch.validate(full=True)
                    yield batch

    def find(self, records: Sequence[ImageRecord]) -> Known:
        """Find the row of each image; each row is of one image."""
        by_file: dict[FileState, list[JournalRow]] = defaultdict(list)
        failed: set[FileState] = set()
        names = [*FILE_COLUMNS, "checksum", "error"]
        for batch in self.read_batches():
            values = zip(*(batch[name].to_pylist() for name in names), strict=True)
            for position, (path, size, time, checksum, error) in enumerate(values):
                file = FileState(path, size, time)
                if error is None:
                    by_file[file].append(JournalRow(batch, position, file, checksum))
                else:
                    failed.add(file)

        files = [read_file_state(record.content) for record in records]
        rows: dict[int, JournalRow] = {}
        for index, file in enumerate(files):
            if file.path is not None and by_file[file]:
                rows[index] = by_file[file].pop(0)

        # Images that have another name or time, and images without a file
        by_content: dict[str | None, list[JournalRow]] = defaultdict(list)
        for row in chain.from_iterable(by_file.values()):
            by_content[row.checksum].append(row)
        missing = [index for index in range(len(files)) if index not in rows]
        missing.sort(key=lambda index: files[index] in failed)
        for index in missing if by_content else ():
            if group := by_content.get(compute_checksum(records[index].content)):
                rows[index] = group.pop(0)

        left_out = [
            (os.fsdecode(row.file.path or row.checksum or ""), row.checksum)
            for row in chain.from_iterable(by_content.values())
        ]
        present = {os.fsdecode(file.path or "") for file in files}
        before = {*map(tuple, self.read_table_record()["left_out"])}
        lost = [row[0] for row in left_out if row not in before and row[0] not in present]
        unknown = {index: files[index] for index in missing if index not in rows}
        return Known(rows, unknown, left_out, lost)

    def check_is_complete(self, known: Known) -> None:
        """Raise ValueError if the table has images that are not in the input."""
        if self.table.exists() and (lost := sorted(known.lost)):
            raise ValueError(
                f"{self.table} has images that are not among these ({len(lost):,}), such as {lost[0]}. "
                "Pass them too, set another `output`, or set `overwrite` to leave them out"
            )

    def append(
        self, name: str, files: Mapping[int, FileState], rows: Iterator[Row], batch_size: int
    ) -> None:
        """Append the rows of a process, each batch as soon as it is computed.

        Args:
            name: of the part.
            files: index of an image -> its file before it is read. If it changes until then, its row
                is of another file, and is computed again.
            rows: of the process.
            batch_size: number of rows to append at once.
        """
        file = str(self.folder / f"{name}.arrow")
        with pa.OSFile(file, "wb") as stream, pa.ipc.new_stream(stream, self.schema) as writer:
            while batch := list(islice(rows, batch_size)):
                values = [row | files[row["index"]]._asdict() for row in batch]
                writer.write_batch(pa.RecordBatch.from_pylist(values, self.schema))

    # Table ------------------------------------------------------------------------------------

    def write_table(
        self,
        records: Sequence[ImageRecord],
        known: Known,
        run: str,
        edit: Callable[[pa.Table], pa.Table] = lambda table: table,
    ) -> pa.Table:
        """Write the table of all images, and return what the model says, without features.

        Args:
            edit: changes the values of a part of the table, or adds columns, before it is written.

        Raises:
            OSError: if rows are missing, because the processes do not share a file system.
        """
        places = {index: (row.batch, row.position) for index, row in known.rows.items()}
        for batch in self.read_batches(run):
            indices = batch["index"].to_pylist()
            places |= {index: (batch, position) for position, index in enumerate(indices)}
        if len(places) < len(records):
            raise OSError(
                f"{self.folder} lacks {len(records) - len(places):,} of {len(records):,} rows. The "
                "processes require one file system: set `output` to a file there"
            )

        columns = [name for name in self.schema.names if name not in FILE_COLUMNS]
        summaries = []

        def build_tables() -> Iterator[pa.Table]:
            for start in range(0, len(records), ROWS_PER_GROUP):
                group = range(len(records))[start : start + ROWS_PER_GROUP]
                rows = [places[index][0].slice(places[index][1], 1) for index in group]
                table = pa.Table.from_batches(rows, self.schema).select(columns)
                table = table.combine_chunks()  # A chunk for each row would take kilobytes
                names = [
                    records[index].name if index in known.rows else name
                    for index, name in zip(group, table["image"].to_pylist(), strict=True)
                ]
                table = table.set_column(0, "index", pa.array(group, pa.int64()))
                table = table.set_column(1, "image", pa.array(names, pa.string()))
                summaries.append(table.select(kept))
                yield edit(table)

        schema = pa.schema([self.schema.field(name) for name in columns])
        kept = [name for name in columns if name in SUMMARY]
        schema = edit(schema.empty_table()).schema
        with write_atomically(self.table) as file:
            self.write(build_tables(), schema, file)
            digests = [*self.read_table_record()["digests"], compute_file_digest(file)][-2:]
            write_json(self.folder / TABLE_FILE, {"digests": digests, "left_out": known.left_out})
        for remainder in self.table.parent.glob(f".{escape(self.table.name)}.*{UNFINISHED_SUFFIX}"):
            remainder.unlink(missing_ok=True)  # left by a run that was killed here
        return pa.concat_tables(summaries)
