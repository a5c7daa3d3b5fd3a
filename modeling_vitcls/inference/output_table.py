"""The table of `predict`: what a person has edited is never lost.

labels.csv              the table
labels.edited.csv       what a person has made of it, after `overwrite`
labels.changed.csv      photos that an earlier table had with another label
.labels.csv.written     digests of the tables that `predict` has written there
"""

import shutil
from collections.abc import Iterator
from contextlib import suppress
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
        """Read the digests of the tables that were written here."""
        with suppress(OSError, ValueError):  # Without the list, no table is known
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
        # Left by a command that was killed while it wrote the table
        for remainder in self.file.parent.glob(f".{escape(self.file.name)}.*{UNFINISHED_SUFFIX}"):
            remainder.unlink(missing_ok=True)

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
            kept = self.file
            if self.is_edited:
                while kept.exists():
                    kept = kept.with_stem(f"{kept.stem}.edited")
                shutil.copy2(self.file, kept)
                print(f"{kept}: the table as you have edited it")
            elif kept.exists():
                self.list_changes(summary)
            # Earlier ones stay known: this one may not replace a table that is in use
            digests = [*self.read_digests(), compute_file_digest(file)]
            write_text(self.digest_file, "\n".join(digests))
        return summary

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
            file = self.file.with_suffix(".changed.csv")
            shown = changed.filter("image label_before label source".split())
            shown = shown.map(lambda cell: escape_csv_cell(str(cell)), na_action="ignore")
            shown.to_csv(file, index=False)
            print(f"{file}: {len(changed):,} photos whose label has changed")
