"""From rows to what a person or a program reads: a table, CSV, JSON, JSON lines, Parquet.

A writer takes an iterator of rows and writes them as they come. Files appear under their name whole, or not at all.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .prediction_answers import Row


LABEL_SEPARATOR = "|"  # in CSV, between the labels of one image
WIDE = 100_000  # characters
ROWS_PER_GROUP = 1024  # of a Parquet file: what is kept in memory while writing, and what readers load at once

Columns = dict[str, pa.DataType]


def all_columns(answers: Columns) -> Columns:
    """The columns of every output: the image, the answers about it, and what went wrong."""
    return {"index": pa.int64(), "image": pa.string(), **answers, "error": pa.string()}


def write_rows(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Write a file in the format of its suffix, in place of one that was there.

    Raises:
        OSError: if it cannot be written; nothing is left of it then.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as unfinished:
        WRITERS[file.suffix.lower()](rows, columns, unfinished)


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A hidden file to write, which becomes `file` once it is complete and on disk, or is removed."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name as well
    finally:
        os.close(folder)


# Writers -------------------------------------------------------------------------------------------------------------


def write_csv(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Comma-separated, with a header; several labels of one image in one cell."""
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, list(columns))
        writer.writeheader()
        writer.writerows({name: in_one_cell(value) for name, value in row.items()} for row in rows)


def in_one_cell(value: Any) -> Any:
    """A list as text."""
    return LABEL_SEPARATOR.join(map(str, value)) if isinstance(value, list) else value


def write_json_lines(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """An object per line."""
    with file.open("w", encoding="utf-8") as text:
        text.writelines(f"{as_json(row)}\n" for row in rows)


def write_json(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """A list of objects, one per line."""
    with file.open("w", encoding="utf-8") as text:
        text.write("[")
        write_separated(rows, text)
        text.write("\n]\n")


def write_separated(rows: Iterable[Row], text: TextIO) -> None:
    """Objects with commas between them."""
    for place, row in enumerate(rows):
        text.write(",\n" if place else "\n")
        text.write(as_json(row))


def as_json(row: Row) -> str:
    """One row; what it does not have is null."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=np.ndarray.tolist)


def write_parquet(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Apache Parquet. Its metadata says under `failed` how many images have an error."""
    schema = pa.schema(list(columns.items()))
    rows = iter(rows)
    failed = 0
    with pq.ParquetWriter(file, schema) as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            failed += sum(row["error"] is not None for row in group)
            writer.write_table(pa.Table.from_pylist(group, schema))
        writer.add_key_value_metadata({"failed": str(failed)})


WRITERS: dict[str, Callable[[Iterable[Row], Columns, Path], None]] = {
    ".csv": write_csv,
    ".json": write_json,
    ".jsonl": write_json_lines,
    ".parquet": write_parquet,
}


# Table ---------------------------------------------------------------------------------------------------------------


def show_table(rows: Iterable[Row], columns: Columns) -> None:
    """Print a table of all columns but the number; without `error` where there is none."""
    rows = list(rows)
    shown = [name for name in columns if name != "index"]
    if all(row["error"] is None for row in rows):
        shown.remove("error")
    table = Table()
    for name in shown:
        is_number = pa.types.is_floating(columns[name])
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(as_text(row[name])) for name in shown))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE  # lines stay whole for the program that reads them
    console.print(table)


def as_text(value: Any) -> str:
    """One cell of the table."""
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else str(value)
