"""Outputs of a prediction: a table, CSV, JSON, JSON lines, Parquet, a folder of Parquet files, and progress.

A writer writes the rows of an iterator as they are computed. An output file gets its name only when it is complete.

A folder of Parquet shards can be completed over several starts:

    folder/.manifest.json          the input, the model, and the flags that change a prediction
    folder/shard-000000.parquet    images 0 .. size - 1
    folder/shard-000001.parquet    images size .. 2 * size - 1, and so on

The images of a shard depend only on the input, so the number of processes may change between starts. A shard is either
complete or missing. Programs that read the folder as one dataset ignore names with a leading dot.

Progress is written to stderr, as a bar on a terminal and otherwise as lines.
"""

import csv
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import replace_control_characters, written_whole
from .prediction_rows import Row


LABEL_SEPARATOR = "|"  # in CSV, between the labels of one image
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # first characters of spreadsheet formulas
WIDE = 100_000  # width of a table that is not printed on a terminal, in characters
ROWS_PER_GROUP = 1024  # rows per row group of a Parquet file: the number of rows in memory while writing

Columns = dict[str, pa.DataType]


def all_columns(answers: Columns) -> Columns:
    """Return the columns of the output: the image, its predictions, and its error."""
    return {"index": pa.int64(), "image": pa.string(), **answers, "error": pa.string()}


def write_rows(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Write a file in the format of its suffix. An existing file is replaced.

    Raises:
        OSError: if the file cannot be written; no partial file is left.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as unfinished:
        WRITERS[file.suffix.lower()](rows, columns, unfinished)


# Writers -------------------------------------------------------------------------------------------------------------


def write_csv(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Write comma-separated values with a header. Several labels of one image share a cell."""
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(map(in_one_cell, columns))
        writer.writerows([in_one_cell(row[name]) for name in columns] for row in rows)


def in_one_cell(value: Any) -> Any:
    """Return a list as text, and text that a spreadsheet would run as a formula with an apostrophe in front."""
    if isinstance(value, list):
        value = LABEL_SEPARATOR.join(map(str, value))
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def write_json_lines(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Write one JSON object per line."""
    with file.open("w", encoding="utf-8") as text:
        text.writelines(f"{as_json(row)}\n" for row in rows)


def write_json(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Write a JSON list of objects, one per line."""
    with file.open("w", encoding="utf-8") as text:
        text.write("[")
        write_separated(rows, text)
        text.write("\n]\n")


def write_separated(rows: Iterable[Row], text: TextIO) -> None:
    """Write JSON objects separated by commas."""
    for place, row in enumerate(rows):
        text.write(",\n" if place else "\n")
        text.write(as_json(row))


def as_json(row: Row) -> str:
    """Return one row as JSON. Missing values are null."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=np.ndarray.tolist)


def write_parquet(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Write Apache Parquet. The metadata key `failed` is the number of images with an error."""
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
    """Print a table of all columns except `index`; without `error` if there are no errors."""
    rows = list(rows)
    shown = [name for name in columns if name != "index"]
    if all(row["error"] is None for row in rows):
        shown.remove("error")
    table = Table()
    for name in shown:
        is_number = pa.types.is_floating(columns[name])
        table.add_column(
            Text(replace_control_characters(name)), justify="right" if is_number else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(as_text(row[name])) for name in shown))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE  # no line breaks within rows, for programs that read the table
    console.print(table)


def as_text(value: Any) -> str:
    """Return the text of one table cell."""
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else replace_control_characters(str(value))


SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Count rows and show progress. Use it as a context manager around the code that consumes the rows."""

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
        self.started = self.last_line = time.perf_counter()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()
        if error is None:
            self.say()

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the same rows and count them."""
        for row in rows:
            self.num_images += 1
            self.num_failed += row["error"] is not None
            self.bar.update(self.task, completed=self.num_images)
            if self.bar.disable and time.perf_counter() - self.last_line > SECONDS_BETWEEN_LINES:
                self.say()
            yield row

    def say(self) -> None:
        """Print a progress line."""
        self.last_line = time.perf_counter()
        speed = self.num_images / (self.last_line - self.started)
        total = "" if self.total is None else f" of {self.total:,}"
        failed = f", {self.num_failed:,} without an answer (see the column `error`)" if self.num_failed else ""
        self.console.print(f"{self.num_images:,}{total} images, {speed:,.0f} images/s{failed}", markup=False)


MANIFEST = ".manifest.json"
FORMAT = 1


@dataclass
class ShardFolder:
    """An output folder, and the number of images in each of its shards."""

    path: Path
    size: int

    def file(self, number: int) -> Path:
        """Return the path of a shard."""
        return self.path / f"shard-{number:06}.parquet"

    def done(self) -> set[int]:
        """Return the numbers of the existing shards."""
        return {int(file.stem.removeprefix("shard-")) for file in self.path.glob("shard-*.parquet")}

    def begin(self, contents: dict[str, Any]) -> int | None:
        """Create the folder, or check that its manifest has the same contents. Call it only on the main process.

        Returns:
            Number of images of the input, if an earlier start recorded it.

        Raises:
            ValueError: if the folder has other contents.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in self.path.glob(".*.unfinished"):
            unfinished.unlink()  # left by a process that was killed
        contents = {"format": FORMAT, "shard_size": self.size, **contents}
        manifest = self.manifest()
        if manifest is None:
            if any(self.path.iterdir()):
                raise ValueError(f"--output {self.path} holds other files: name a new or empty folder")
            self.write_manifest({"num_images": None, **contents})
            return None
        num_images = manifest.pop("num_images", None)
        if difference := first_difference(manifest, contents):
            raise ValueError(f"--output {self.path} was begun with {difference}: repeat that, or name another folder")
        return num_images

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest of the folder; None if there is none."""
        file = self.path / MANIFEST
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write the manifest of the folder."""
        with written_whole(self.path / MANIFEST) as unfinished:
            unfinished.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def set_num_images(self, num_images: int) -> None:
        """Record the number of images in the manifest, so that the next start does not have to count them."""
        self.write_manifest({**(self.manifest() or {}), "num_images": num_images})

    def is_complete(self, num_images: int) -> bool:
        """Return whether all shards exist."""
        return self.done().issuperset(range(math.ceil(num_images / self.size)))

    def counts(self, num_images: int) -> tuple[int, int]:
        """Return the number of rows, and of rows with an error, in all shards.

        Raises:
            ValueError: if a file is damaged or has a different number of rows.
        """
        rows = failed = 0
        for number, indices in enumerate(shard_ranges(num_images, self.size)):
            file = self.file(number)
            try:
                footer = pq.read_metadata(file)
            except Exception as error:  # pyarrow raises several kinds
                raise ValueError(f"{file} is damaged ({error}): delete it and start again") from error
            if footer.num_rows != len(indices):
                raise ValueError(
                    f"{file} has {footer.num_rows} rows in place of {len(indices)}: delete it and start again"
                )
            rows += footer.num_rows
            failed += int(footer.metadata[b"failed"])
        return rows, failed


def shard_ranges(num_images: int | None, size: int) -> Iterator[range]:
    """Yield the image indices of each shard, endlessly if `num_images` is None."""
    numbers = count() if num_images is None else range(math.ceil(num_images / size))
    for number in numbers:
        end = (number + 1) * size
        yield range(number * size, end if num_images is None else min(end, num_images))


def share(ranges: Iterator[range], process: int, num_processes: int) -> Iterator[range]:
    """Return the ranges of one process. Ranges are assigned to the processes in turn."""
    return islice(ranges, process, None, num_processes)


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return a text with the first difference between two manifests, whose keys are mostly flags; None if equal."""
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            if name in ("format", "input", "model"):
                return f"another {name}"
            return f"--{name.replace('_', '-')} {before.get(name)}, not {now.get(name)}"
    return None
