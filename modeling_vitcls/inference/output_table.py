"""The table of `predict`: what a person has edited is never lost.

labels.csv                   the table
labels.edited.csv            what a person has made of it, after `overwrite`
labels.changed.csv           photos that an earlier table had with another label
labels.changed.edited.csv    what a person has made of that list
.labels.csv.written          digests of the tables and lists that `predict` has written there
.labels.csv.lock             while a command writes them

No file beside the table is written through a link, and none that `predict` has not written is replaced.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from itertools import islice
from pathlib import Path

import pyarrow as pa

from ..runtime.files import (
    UNFINISHED_SUFFIX,
    compute_file_digest,
    escape_csv_cell,
    read_text,
    write_atomically,
    write_text,
)
from ..runtime.staging import lock_file
from .outputs import ROWS_PER_GROUP, Columns, Writer
from .prediction_rows import Row


# Without features, which may not fit into memory
SUMMARY = "index image label probability unknown checksum trained source error".split()


@dataclass(frozen=True)
class OutputTable:
    """The file of a table.

    Attributes:
        file: its path.
        columns: its columns and their types.
        write_file: writes it, one of `WRITERS`.
    """

    file: Path
    columns: Columns
    write_file: Writer

    @property
    def digest_file(self) -> Path:
        """The file that lists what `predict` has written."""
        return self.file.with_name(f".{self.file.name}.written")

    def read_digests(self) -> list[str]:
        """Read the digests of what was written here."""
        with suppress(OSError, ValueError):  # Without the list, no file is known
            return read_text(self.digest_file).split()
        return []

    def remember(self, file: Path) -> None:
        """Add a file to the list of what `predict` has written, before it gets its name."""
        # Earlier ones stay known: this one may not replace a file that is in use
        digests = [*self.read_digests(), compute_file_digest(file)]
        write_text(self.digest_file, "\n".join(digests))

    def is_edited(self, file: Path) -> bool:
        """Tell whether the table or the list of changes is there, and not as `predict` has written it.

        Raise OSError if it is not a regular file.
        """
        if not file.exists():
            return False
        if not file.is_file():
            raise OSError(f"cannot write {file}: it is not a regular file. Set another `output`")
        return compute_file_digest(file) not in self.read_digests()

    @contextmanager
    def reserve(self, overwrite: bool) -> Iterator[None]:
        """Lock the table inside the block.

        Raise ValueError if another command writes it, or if it is not as `predict` has written it, unless
        `overwrite` is set.
        """
        with lock_file(self.file):
            if not overwrite and self.is_edited(self.file):
                raise ValueError(
                    f"{self.file} exists, and is not what `predict` has written there. Rename it, set "
                    "another `output`, or set `overwrite`, which keeps it beside"
                )
            # Left by a command that was killed while it wrote the table
            for remainder in self.file.parent.glob(
                f".{escape(self.file.name)}.*{UNFINISHED_SUFFIX}"
            ):
                remainder.unlink(missing_ok=True)
            yield

    def write(self, rows: Iterator[Row]) -> list[Row]:
        """Write the rows while they are computed, and return their columns of `SUMMARY`."""
        schema = pa.schema(list(self.columns.items()))
        summary: list[Row] = []

        def build_tables() -> Iterator[pa.Table]:
            while group := list(islice(rows, ROWS_PER_GROUP)):
                summary.extend({name: row.get(name) for name in SUMMARY} for row in group)
                yield pa.Table.from_pylist(group, schema)

        with write_atomically(self.file) as file:
            self.write_file(build_tables(), schema, file)
            if self.is_edited(self.file):
                self.keep_edited(self.file)
            elif self.file.exists():
                self.list_changes(summary)
            self.remember(file)
        return summary

    def keep_edited(self, file: Path) -> None:
        """Copy what a person has made of a file to a new name beside it."""
        kept = file
        while os.path.lexists(kept):
            kept = kept.with_stem(f"{kept.stem}.edited")
        with write_atomically(kept) as copy:
            shutil.copy2(file, copy)
        print(f"{kept}: {file.name} as you have edited it")

    def list_changes(self, summary: list[Row]) -> None:
        """Write which photos of the table that is replaced have another label now, and print their number."""
        import pandas as pd  # Slow to import, as what reads tables is

        from ..data.sources import READERS, read_tables

        reader = READERS.get(self.file.suffix.lower(), "json")
        # A list that cannot be made, such as after a table of features, must not cost the new table
        with suppress(KeyError, OSError, ValueError):
            table = read_tables(self.file.parent, reader, {"old": [self.file]})["old"].to_pandas()
            before = table.drop_duplicates("checksum")
            both = pd.DataFrame(summary).merge(before, on="checksum", suffixes=("", "_before"))
            changed = both[both["label"].fillna("") != both["label_before"].fillna("")]
            shown = changed.filter("image label_before label source".split())
            shown = shown.map(lambda cell: escape_csv_cell(str(cell)), na_action="ignore")

            file = self.file.with_suffix(".changed.csv")
            if self.is_edited(file):
                self.keep_edited(file)
            with write_atomically(file) as temporary_file:
                shown.to_csv(temporary_file, index=False)
                self.remember(temporary_file)
            print(f"{file}: {len(changed):,} photos whose label has changed")
