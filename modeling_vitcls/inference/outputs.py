"""Rows of predictions as a printed table or a file."""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from ..runtime.files import escape_csv_cell, replace_control_characters
from ..runtime.progress import build_console
from .prediction_rows import DISTANCE, Row


LABEL_SEPARATOR = "|"  # Separator of the labels of one image in CSV files
ROWS_PER_GROUP = 1024  # Number of rows per row group of a Parquet file

Columns = dict[str, pa.DataType]


def get_output_columns(columns: Columns) -> Columns:
    """Put the columns of a prediction between those that name the image and `error`."""
    return {
        "index": pa.int64(),
        "image": pa.string(),
        **columns,
        "checksum": pa.string(),
        "trained": pa.bool_(),
        "note": pa.string(),
        "error": pa.string(),
    }


# Files --------------------------------------------------------------------------------------------


def write_parquet(tables: Iterable[pa.Table], schema: pa.Schema, file: Path) -> None:
    """Write a Parquet file, one table after another."""
    with pq.ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(table)


def write_csv(
    tables: Iterable[pa.Table], schema: pa.Schema, file: Path, delimiter: str = ","
) -> None:
    """Write separated values with a header; with semicolons, numbers have decimal commas.

    All labels of a multi-label image are in one cell. Texts are escaped, because labels and file
    names may be formulas of a spreadsheet.
    """
    table = pa.concat_tables([schema.empty_table(), *tables])
    frame = table.to_pandas()
    decimal = "," if delimiter == ";" else "."
    for column in table.schema:
        is_list = pa.types.is_list(column.type)
        is_text = column.type in (pa.string(), pa.large_string())
        if is_list or is_text:
            values = table[column.name].to_pylist()
            if is_list:
                values = join_lists(values, decimal)
            frame[column.name] = [value and escape_csv_cell(value) for value in values]

    header = [escape_csv_cell(name) for name in table.column_names]
    text = frame.to_csv(sep=delimiter, decimal=decimal, header=header, index=False)
    # Excel takes a file for UTF-8 only if it begins with this mark.
    file.write_text(text, encoding="utf-8" if text.isascii() else "utf-8-sig", newline="")


def join_lists(values: list[list[Any] | None], decimal: str) -> list[str | None]:
    """Write the labels or probabilities of each image as one text.

    If a label contains the separator, all lists of the column are JSON.
    """

    def spell(item: Any) -> str:
        return str(np.float32(item)).replace(".", decimal) if isinstance(item, float) else item

    if any(LABEL_SEPARATOR in str(item) for item in chain.from_iterable(filter(None, values))):
        return [
            None if value is None else json.dumps(value, ensure_ascii=False) for value in values
        ]
    return [None if value is None else LABEL_SEPARATOR.join(map(spell, value)) for value in values]


def write_json_rows(
    tables: Iterable[pa.Table], file: Path, start: str, separator: str, end: str
) -> None:
    """Write one JSON object per line. Missing values are null."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(start)
        for number, row in enumerate(chain.from_iterable(map(pa.Table.to_pylist, tables))):
            stream.write(separator if number else "")
            json.dump(row, stream, ensure_ascii=False, allow_nan=False, default=float)
        stream.write(end)


Writer = Callable[[Iterable[pa.Table], pa.Schema, Path], None]
WRITERS: dict[str, Writer] = {
    ".csv": write_csv,
    ".json": lambda tables, schema, file: write_json_rows(tables, file, "[\n", ",\n", "\n]\n"),
    ".jsonl": lambda tables, schema, file: write_json_rows(tables, file, "", "\n", "\n"),
    ".parquet": write_parquet,
}


# Terminal -----------------------------------------------------------------------------------------


def print_table(rows: Sequence[Row], columns: Columns) -> None:
    """Print the rows as a table, without the columns `index` and `checksum`.

    The columns `trained`, `note` and `error` are omitted if they say nothing.
    """
    names = [name for name in columns if name not in ("index", "checksum")]
    for name in ("trained", "note", "error"):
        if not any(row[name] for row in rows):
            names.remove(name)
    if DISTANCE in names and "unknown" not in names:  # Nothing to compare it with
        names.remove(DISTANCE)

    table = Table()
    for name in names:
        table.add_column(
            Text(format_table_cell(name)),
            justify="right" if pa.types.is_floating(columns[name]) else "left",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(format_table_cell(row[name])) for name in names))

    build_console().print(table)


def format_table_cell(value: Any) -> str:
    """Format the value of one table cell."""
    if isinstance(value, list):
        return ", ".join(map(format_table_cell, value))
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else replace_control_characters(str(value))
