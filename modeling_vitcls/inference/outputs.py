"""Outputs of a prediction: a table, CSV, JSON, JSON Lines, Parquet, a folder of Parquet files, and progress.

Rows are written while the prediction runs. An output file has a temporary name until all rows are written.

A folder of Parquet shards, which can be completed in several runs of the program, contains:

    folder/.manifest.json          the input, the model, and the flags that affect predictions
    folder/shard-000000.parquet    images 0 .. shard_size - 1
    folder/shard-000001.parquet    images shard_size .. 2 * shard_size - 1, and so on
    folder/.process-1.unfinished   heartbeat of a process that is still writing shards

The images of a shard do not depend on the number of processes, so each run may use a different number of processes.
A shard is either complete or missing. Programs that read the folder as one dataset ignore names with a leading dot.

Progress is written to stderr: a bar on a terminal, and lines otherwise.
"""

import csv
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import format_error
from ..files import read_json, replace_control_characters, write_atomically, write_json
from .prediction_rows import Row


LABEL_SEPARATOR = "|"  # separator of the labels of one image in CSV files
FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")  # first characters of spreadsheet formulas
TABLE_WIDTH = 100_000  # width in characters of a table that is not printed to a terminal
ROWS_PER_GROUP = 1024  # number of rows per row group of a Parquet file; one group at a time is kept in memory
SECONDS_BETWEEN_CHECKS = 0.5  # interval between checks for shards of other processes, in seconds
SECONDS_BETWEEN_HEARTBEATS = 5.0
MAX_HEARTBEAT_AGE = 120.0  # maximum age of a heartbeat in seconds; network file systems may cause a delay of a minute
SECONDS_BETWEEN_LINES = 10.0  # interval between progress lines if the output is not a terminal, in seconds
MANIFEST_FILE = ".manifest.json"
MANIFEST_VERSION = 1  # version of the manifest format

Columns = dict[str, pa.DataType]


def get_output_columns(columns: Columns) -> Columns:
    """Return the columns of the output: the index and name of the image, the prediction, and the error."""
    return {"index": pa.int64(), "image": pa.string(), **columns, "error": pa.string()}


def write_rows(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Write rows to a file in the format given by the suffix of the file name. An existing file is replaced. If an
    OSError is raised, no partial file remains."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(file) as temporary_file:
        WRITERS[file.suffix.lower()](rows, columns, temporary_file)


# Writers -------------------------------------------------------------------------------------------------------------


def write_csv(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Write rows as comma-separated values with a header. All labels of a multi-label image are in one cell."""
    with file.open("w", newline="", encoding="utf-8") as text_file:
        writer = csv.writer(text_file)
        writer.writerow(map(format_csv_cell, columns))
        writer.writerows([format_csv_cell(row[name]) for name in columns] for row in rows)


def format_csv_cell(value: Any) -> Any:
    """Join lists, and put an apostrophe before text that a spreadsheet would interpret as a formula."""
    if isinstance(value, list):
        value = LABEL_SEPARATOR.join(map(str, value))
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_PREFIXES) else value


def write_json_lines(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Write each row as a JSON object on one line."""
    with file.open("w", encoding="utf-8") as text_file:
        text_file.writelines(f"{format_json(row)}\n" for row in rows)


def write_json_list(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Write the rows as a JSON array, with one object per line."""
    with file.open("w", encoding="utf-8") as text_file:
        text_file.write("[")
        for index, row in enumerate(rows):
            text_file.write(",\n" if index else "\n")
            text_file.write(format_json(row))
        text_file.write("\n]\n")


def format_json(row: Row) -> str:
    """Return one row as JSON. Missing values are null."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=np.ndarray.tolist)


def write_parquet(rows: Iterable[Row], columns: Columns, file: Path) -> None:
    """Write rows to an Apache Parquet file. The metadata key `failed` stores the number of images with an error."""
    schema = pa.schema(list(columns.items()))
    rows = iter(rows)
    num_failed = 0
    with pq.ParquetWriter(file, schema) as writer:
        while row_group := list(islice(rows, ROWS_PER_GROUP)):
            num_failed += sum(row["error"] is not None for row in row_group)
            writer.write_table(pa.Table.from_pylist(row_group, schema))
        writer.add_key_value_metadata({"failed": str(num_failed)})


WRITERS: dict[str, Callable[[Iterable[Row], Columns, Path], None]] = {
    ".csv": write_csv,
    ".json": write_json_list,
    ".jsonl": write_json_lines,
    ".parquet": write_parquet,
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


# Shards --------------------------------------------------------------------------------------------------------------


@dataclass
class ShardFolder:
    """An output folder with shards of `shard_size` images each."""

    path: Path
    shard_size: int

    def get_shard_file(self, shard_index: int) -> Path:
        """Return the path of the shard with the given index."""
        return self.path / f"shard-{shard_index:06}.parquet"

    def list_shards(self) -> set[int]:
        """Return the indices of the existing shards."""
        return {int(file.stem.removeprefix("shard-")) for file in self.path.glob("shard-*.parquet")}

    def open(self, manifest: dict[str, Any]) -> int | None:
        """Create the folder with a manifest, or check that an existing folder has the same manifest. Raise ValueError
        if the manifest differs, or if the folder contains files but no manifest. Return the number of images that an
        earlier run recorded, or None. Call this method only on the main process."""
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished_file in self.path.glob(".*.unfinished"):
            unfinished_file.unlink()  # heartbeat or partial shard of a process that was killed
        manifest = {"format": MANIFEST_VERSION, "shard_size": self.shard_size, **manifest}
        file = self.path / MANIFEST_FILE
        if not file.exists():
            if any(self.path.iterdir()):
                raise ValueError(f"--output {self.path} contains other files. Set a new or empty folder")
            write_json(file, {"num_images": None, **manifest})
            return None
        stored_settings = read_json(file)
        num_images = stored_settings.pop("num_images", None)
        if difference := describe_difference(stored_settings, manifest):
            raise ValueError(
                f"--output {self.path} was written with {difference}. Use the same flags, or a new folder"
            )
        return num_images

    def record_num_images(self, num_images: int) -> None:
        """Write the number of images to the manifest, so that the next run does not have to count the images."""
        file = self.path / MANIFEST_FILE
        write_json(file, {**read_json(file), "num_images": num_images})

    def is_complete(self, num_images: int) -> bool:
        """Return whether all shards exist."""
        return self.list_shards().issuperset(range(math.ceil(num_images / self.shard_size)))

    def get_heartbeat_file(self, process_index: int) -> Path:
        """Return the path of the heartbeat file of a process. `open` removes the heartbeat files of earlier runs."""
        return self.path / f".process-{process_index}.unfinished"

    def wait_for_shards(self, num_images: int, num_processes: int) -> None:
        """Wait until all shards exist. Call this method on process 0, after all processes have sent a heartbeat. Raise
        OSError if shards are still missing when all other processes have ended or a heartbeat is too old."""
        main_file, *other_files = map(self.get_heartbeat_file, range(num_processes))
        while True:
            main_file.touch()
            now = main_file.stat().st_mtime  # current time according to the file system's clock
            heartbeat_times = []
            for file in other_files:
                with suppress(FileNotFoundError):  # a process removes its heartbeat file when the process ends
                    heartbeat_times.append(file.stat().st_mtime)
            has_lost_process = not heartbeat_times or now - min(heartbeat_times) > MAX_HEARTBEAT_AGE
            if self.is_complete(num_images):
                return
            if has_lost_process:
                raise OSError(
                    f"{self.path} lacks shards of a process that has ended. Repeat the command to write the missing "
                    "shards"
                )
            time.sleep(SECONDS_BETWEEN_CHECKS)

    def count_rows(self, num_images: int) -> tuple[int, int]:
        """Return the number of rows in all shards, and the number of rows with an error. Raise ValueError if a file is
        damaged or has the wrong number of rows."""
        num_failed = 0
        for shard_index, indices in enumerate(iterate_shards(num_images, self.shard_size)):
            file = self.get_shard_file(shard_index)
            try:
                metadata = pq.read_metadata(file)
            except Exception as error:  # pyarrow raises several types of errors
                raise ValueError(
                    f"{file} is damaged ({format_error(error)}). Delete the file and repeat the command"
                ) from error
            if metadata.num_rows != len(indices):
                raise ValueError(
                    f"{file} must have {len(indices)} rows, but has {metadata.num_rows}. Delete the file and repeat "
                    "the command"
                )
            num_failed += int(metadata.metadata[b"failed"])
        return num_images, num_failed


@contextmanager
def send_heartbeats(file: Path) -> Iterator[None]:
    """Touch a file regularly in a thread, to signal to the processes on all hosts that this process is running. Remove
    the file at the end of the `with` block."""
    stop_event = threading.Event()

    def update_file() -> None:
        while not stop_event.wait(SECONDS_BETWEEN_HEARTBEATS):
            with suppress(OSError):  # for example, if the disk is full
                file.touch()

    file.touch()
    thread = threading.Thread(target=update_file, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop_event.set()
        thread.join()
        file.unlink(missing_ok=True)


def iterate_shards(num_images: int | None, shard_size: int) -> Iterator[range]:
    """Yield the image indices of each shard, indefinitely if `num_images` is None."""
    shard_indices = count() if num_images is None else range(math.ceil(num_images / shard_size))
    for shard_index in shard_indices:
        end = (shard_index + 1) * shard_size
        yield range(shard_index * shard_size, end if num_images is None else min(end, num_images))


def describe_difference(stored_settings: dict[str, Any], current_settings: dict[str, Any]) -> str | None:
    """Return a description of the first difference between two manifests, or None if the manifests are equal."""
    for name in {**stored_settings, **current_settings}:
        if stored_settings.get(name) != current_settings.get(name):
            if name in ("format", "input", "model"):
                return f"another {name}"
            return f"--{name.replace('_', '-')} {stored_settings.get(name)}, not {current_settings.get(name)}"
    return None
