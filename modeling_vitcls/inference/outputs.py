"""Rows as a printed table or a file, and progress. shards.py writes folders of Parquet files."""

import csv
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import replace_control_characters, write_atomically
from .prediction_rows import Row


LABEL_SEPARATOR = "|"  # separator of the labels of one image in CSV files
FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")  # first characters of spreadsheet formulas
TABLE_WIDTH = 100_000  # width in characters of a table that is not printed to a terminal
ROWS_PER_GROUP = 1024  # number of rows per row group of a Parquet file
SECONDS_BETWEEN_LINES = 10.0  # interval between progress lines if the output is not a terminal, in seconds

Columns = dict[str, pa.DataType]


def get_output_columns(columns: Columns) -> Columns:
    """Return the columns of the output: the index and name of the image, the prediction, and the error."""
    return {"index": pa.int64(), "image": pa.string(), **columns, "error": pa.string()}


# Files ---------------------------------------------------------------------------------------------------------------


def write_rows(rows: Iterable[Row], columns: Columns, file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write rows to a file in the format given by the suffix of the file name, and replace an existing file. If an
    OSError is raised, no partial file remains. Parquet files also store `metadata`."""
    table = pa.Table.from_pylist(list(rows), pa.schema(list(columns.items()), metadata))
    write_table(table, file)


def write_table(table: pa.Table, file: Path) -> None:
    """Write an Arrow table as `write_rows` does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(file) as temporary_file:
        WRITERS[file.suffix.lower()](table, temporary_file)


def write_csv(table: pa.Table, file: Path) -> None:
    """Write comma-separated values with a header. All labels of a multi-label image are in one cell."""
    with file.open("w", newline="", encoding="utf-8") as text_file:
        writer = csv.writer(text_file)
        writer.writerow(map(format_csv_cell, table.column_names))
        writer.writerows(map(format_csv_cell, row.values()) for row in iterate_rows(table))


def format_csv_cell(value: Any) -> Any:
    """Join lists, replace control characters, and put an apostrophe before text that a spreadsheet would interpret as
    a formula."""
    if isinstance(value, list):
        value = LABEL_SEPARATOR.join(map(str, value))
    if not isinstance(value, str):
        return value
    text = replace_control_characters(value)
    return f"'{text}" if value.startswith(FORMULA_PREFIXES) else text


def write_json(table: pa.Table, file: Path, start: str = "[\n", separator: str = ",\n", end: str = "\n]\n") -> None:
    """Write the rows as a JSON array with one object per line. Missing values are null."""
    with file.open("w", encoding="utf-8") as text_file:
        text_file.write(start)
        for index, row in enumerate(iterate_rows(table)):
            text_file.write(separator if index else "")
            text_file.write(json.dumps(row, ensure_ascii=False, allow_nan=False, default=lambda array: array.tolist()))
        text_file.write(end)


def iterate_rows(table: pa.Table) -> Iterator[Row]:
    """Yield the rows of a table as dicts."""
    for batch in table.to_batches(ROWS_PER_GROUP):
        yield from batch.to_pylist()


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    ".csv": write_csv,
    ".json": write_json,
    ".jsonl": lambda table, file: write_json(table, file, "", "\n", "\n"),
    ".parquet": lambda table, file: pq.write_table(table, file, row_group_size=ROWS_PER_GROUP),
}


# Terminal ------------------------------------------------------------------------------------------------------------


def print_table(rows: Iterable[Row], columns: Columns) -> None:
    """Print the rows as a table without the column `index`, and without the column `error` if there are no errors."""
    rows = list(rows)
    names = [name for name in columns if name != "index"]
    if all(row["error"] is None for row in rows):
        names.remove("error")
    table = Table()
    for name in names:
        header = Text(replace_control_characters(name))
        table.add_column(header, justify="right" if pa.types.is_floating(columns[name]) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(format_table_cell(row[name])) for name in names))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = TABLE_WIDTH  # no line breaks within rows, for programs that read the table
    console.print(table)


def format_table_cell(value: Any) -> str:
    """Return the text of one table cell."""
    if isinstance(value, list):
        return ", ".join(map(format_table_cell, value))
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else replace_control_characters(str(value))


class Progress:
    """Context manager that counts rows and shows progress while the rows are consumed."""

    def __init__(self, total: int | None, is_shown: bool) -> None:
        self.num_images = 0
        self.num_failed = 0
        self.total = total
        self.console = Console(stderr=True, quiet=not is_shown, highlight=False, soft_wrap=True)
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal or not is_shown,
        )
        self.task = self.bar.add_task("predicting", total=total)
        self.start_time = self.last_line_time = time.perf_counter()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, exc_type: object, exc_value: object, traceback: object) -> None:
        self.bar.stop()
        if exc_value is None:
            self.print_progress()

    def track_rows(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows unchanged, count the rows and show progress."""
        for row in rows:
            self.num_images += 1
            self.num_failed += row["error"] is not None
            self.bar.update(self.task, completed=self.num_images)
            if self.bar.disable and time.perf_counter() - self.last_line_time > SECONDS_BETWEEN_LINES:
                self.print_progress()
            yield row

    def print_progress(self) -> None:
        """Print the number of images, the throughput and the number of images without a prediction."""
        self.last_line_time = time.perf_counter()
        images_per_second = self.num_images / (self.last_line_time - self.start_time)
        total_text = "" if self.total is None else f" of {self.total:,}"
        failure_text = (
            f", {self.num_failed:,} without a prediction (see the column `error`)" if self.num_failed else ""
        )
        self.console.print(
            f"{self.num_images:,}{total_text} images, {images_per_second:,.0f} images/s{failure_text}", markup=False
        )
