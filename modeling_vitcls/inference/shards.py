"""Folders of Parquet files (`predict --output FOLDER`), written by independent jobs.

    shard-000003.parquet           images 3 * shard_size, ... of a list or a dataset
    shard-0001-000003.parquet      the fourth file of worker 1, for a stream

A job `--shard i/n` with p processes has p of the n * p workers. Each shard is written atomically by
one worker. The metadata of every file contains the settings of the prediction, so a repeated
command skips finished shards and refuses files of another model or input. For a stream, the
metadata also contains the position from which a repeated command continues.

The name of a shard determines the indices of its images. A shard with other indices, such as a copy
of another shard, is an error, both for a repeated command and for `--merge`.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.image_folder import format_name_list
from ..runtime.errors import format_error
from .outputs import Columns, get_output_columns, write_rows, write_table


METADATA_KEY = b"vitcls"
SHARD_NAME = re.compile(r"shard-(?:(?P<worker>\d{4,})-)?(?P<shard>\d{6,})\.parquet", re.ASCII)
# Maximum number of missing shards that are counted; a damaged file may name trillions.
MAX_COUNTED_SHARDS = 1000
# Age in seconds from which a partial file belongs to a process that was killed. Writing a shard
# takes seconds.
MIN_UNFINISHED_AGE = 3600.0


@dataclass(frozen=True)
class ShardFolder:
    """An output folder, the settings in its files, and their number (None for a stream)."""

    path: Path
    shard_size: int
    settings: dict[str, Any]
    num_shards: int | None = None

    def get_file(self, shard_index: int, worker_index: int | None = None) -> Path:
        """Return the path of a shard. `worker_index` is set for streams."""
        return self.path / format_shard_name(shard_index, worker_index)

    def open(self) -> None:
        """Create the folder.

        Raise ValueError if it contains other files, or shards with other settings. Remove the
        partial files of processes that were killed, but not those of living ones.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        shards, other_files = list_shards(self.path)
        if other_files:
            names = format_name_list([file.name for file in other_files])
            raise ValueError(
                f"`output={str(self.path)!r}` contains other files ({names}). Set a new or empty "
                "folder"
            )

        if shards:
            self.check_settings(shards[0], read_metadata(shards[0]))
        for file in shards:
            check_name(file, self.num_shards, self.settings)

        for unfinished_file in self.path.glob(".shard-*.unfinished"):
            with suppress(FileNotFoundError):  # renamed or removed by another process
                if time.time() - unfinished_file.stat().st_mtime > MIN_UNFINISHED_AGE:
                    unfinished_file.unlink()

    def check_settings(self, file: Path, metadata: dict[str, Any]) -> None:
        """Raise ValueError if the settings in a shard differ from those of this prediction."""
        for name, value in self.settings.items():
            if metadata["settings"].get(name) != value:
                difference = f"another {name}" if name in ("input", "model") else f"other `{name}`"
                raise ValueError(
                    f"`output={str(self.path)!r}` was written with {difference} ({file.name}). Set "
                    "a new `output` folder"
                )

    def read_finished(self, file: Path) -> dict[str, Any] | None:
        """Return the metadata of a finished shard, or None.

        Raise ValueError if the shard belongs to another prediction.
        """
        if file.exists():
            metadata = read_metadata(file)
            self.check_settings(file, metadata)
            check_indices(file, metadata)
            return metadata
        return None

    def write(
        self, file: Path, rows: list[dict[str, Any]], columns: Columns, **fields: Any
    ) -> dict[str, Any]:
        """Write a shard, and return its metadata. `fields` are added to the metadata."""
        num_failed = sum(row["error"] is not None for row in rows)
        metadata = {"settings": self.settings, "images": len(rows), "failed": num_failed, **fields}
        write_rows(
            rows, get_output_columns(columns), file, {METADATA_KEY.decode(): json.dumps(metadata)}
        )
        return metadata


def list_shard_indices(num_images: int, shard_size: int) -> list[range]:
    """Return the image indices of each shard."""
    return [
        range(start, min(start + shard_size, num_images))
        for start in range(0, num_images, shard_size)
    ]


# Names --------------------------------------------------------------------------------------------


def format_shard_name(shard_index: int, worker_index: int | None = None) -> str:
    """Return the file name of a shard. `worker_index` is set for streams."""
    prefix = "" if worker_index is None else f"{worker_index:04}-"
    return f"shard-{prefix}{shard_index:06}.parquet"


def parse_shard_name(name: str) -> tuple[int, int | None] | None:
    """Return the index and the worker of a shard (None without workers); None for another file."""
    match = SHARD_NAME.fullmatch(name)
    if match is None:
        return None
    indices = int(match["shard"]), None if match["worker"] is None else int(match["worker"])
    return indices if format_shard_name(*indices) == name else None


def list_shards(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the shards of a folder in their order, and all other files except hidden files."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    shards = [file for file in files if parse_shard_name(file.name) is not None]
    return shards, [file for file in files if file not in shards]


def check_name(file: Path, num_shards: int | None, settings: dict[str, Any]) -> None:
    """Raise ValueError if a prediction does not write this file.

    The prediction has `num_shards` shards, or None for a stream.
    """
    shard_index, worker_index = parse_shard_name(file.name) or (None, None)
    if num_shards is None:
        is_expected = worker_index is not None and worker_index < settings["num_workers"]
    else:
        is_expected = worker_index is None and shard_index is not None and shard_index < num_shards
    if not is_expected:
        raise ValueError(f"{file} is not a file of this prediction. Delete the file, and repeat")


# Contents -----------------------------------------------------------------------------------------


def read_metadata(file: Path) -> dict[str, Any]:
    """Return the metadata of a shard. Raise ValueError if the file is damaged."""
    if not file.is_file():  # a pipe, from which reading would wait forever
        raise ValueError(f"{file} is not a regular file. Delete it, and repeat")
    with explain_damage(file):
        metadata = pq.read_metadata(file)
        fields = json.loads(metadata.metadata[METADATA_KEY])
        if fields["images"] != metadata.num_rows:
            raise ValueError(f"{metadata.num_rows} of {fields['images']} rows")
        if not isinstance(fields.get("num_shards", 0), int):
            raise ValueError("its number of shards is not a number")
    return fields


@contextmanager
def explain_damage(file: Path) -> Iterator[None]:
    """Raise ValueError of one line for any error while a shard is read."""
    try:
        yield
    except Exception as error:  # pyarrow raises several types of errors
        raise ValueError(
            f"{file} is damaged ({format_error(error)}). Delete the file, and repeat"
        ) from error


def check_indices(file: Path, metadata: dict[str, Any]) -> None:
    """Raise ValueError if the images of a shard are not exactly those that its name determines."""
    shard_index, worker_index = parse_shard_name(file.name) or (0, None)
    with explain_damage(file):
        settings = metadata["settings"]
        num_images = metadata["images"]
        shard_size = settings["shard_size"]
        start = shard_index * shard_size
        step = 1
        expected_size = shard_size

        if worker_index is not None:
            step = settings["num_workers"]
            start = start * step + worker_index
        if worker_index is not None and metadata["is_last"]:
            expected_size = num_images
        elif worker_index is None and shard_index == metadata["num_shards"] - 1:
            expected_size = settings["input"]["images"] - start

        expected = list(range(start, start + num_images * step, step))
        indices = pq.read_table(file, columns=["index"])["index"].to_pylist()

    if num_images != expected_size or indices != expected:
        raise ValueError(
            f"{file} contains other images than its name says. Delete the file, and repeat"
        )


def check_shards(folder: Path) -> list[dict[str, Any]]:
    """Return the metadata of the shards of a complete folder.

    Raise ValueError if shards are missing, if the folder contains other files, or if the shards are
    not those of one prediction.
    """
    shards, other_files = list_shards(folder) if folder.is_dir() else ([], [])
    if not shards:
        raise ValueError(
            f"{folder} contains no shards. Set `merge` to the `output` folder of `vitcls predict`"
        )
    if other_files:
        names = format_name_list([file.name for file in other_files])
        raise ValueError(f"{folder} contains other files ({names}). Move them elsewhere")

    metadata = {file.name: read_metadata(file) for file in shards}
    first = metadata[shards[0].name]
    columns = pq.read_schema(shards[0])

    for file in shards:
        fields = metadata[file.name]
        has_same_number = fields.get("num_shards") == first.get("num_shards")
        is_same = fields["settings"] == first["settings"] and has_same_number
        if not is_same or not pq.read_schema(file).equals(columns):
            raise ValueError(
                f"{file} was written with other flags than {shards[0].name}. Delete the file"
            )
        check_indices(file, fields)
        check_name(file, first.get("num_shards"), first["settings"])

    for name in metadata:
        shard_index, worker_index = parse_shard_name(name) or (0, None)
        previous = format_shard_name(shard_index - 1, worker_index)
        if worker_index is not None and metadata.get(previous, {}).get("is_last"):
            raise ValueError(
                f"{folder / name} follows the last shard of its worker. Delete the file, and repeat"
            )

    if missing := list(islice(iterate_missing_shards(metadata), MAX_COUNTED_SHARDS + 1)):
        number = f"{len(missing):,}"
        if len(missing) > MAX_COUNTED_SHARDS:
            number = f"more than {MAX_COUNTED_SHARDS:,}"
        names = format_name_list(missing)
        raise ValueError(
            f"{folder} lacks {number} shards: {names}. Repeat the commands that write them"
        )
    return list(metadata.values())


def iterate_missing_shards(metadata: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the names of the missing shards, given the metadata of the existing ones by file name.

    A worker of a stream lacks the shard after its existing ones, unless the last one is complete.
    """
    first = next(iter(metadata.values()))
    if "num_shards" in first:
        expected = map(format_shard_name, range(first["num_shards"]))
        yield from (name for name in expected if name not in metadata)
        return

    for worker_index in range(first["settings"]["num_workers"]):
        worker_names = (format_shard_name(index, worker_index) for index in count())
        name = next(
            name for name in worker_names if name not in metadata or metadata[name]["is_last"]
        )
        if name not in metadata:
            yield name


def merge_shards(folder: Path, output: Path | None) -> str:
    """Write the rows of all shards to one file, if `output` is set.

    Return a line of text with the number of images.

    Raises:
        ValueError: If the folder does not contain exactly the shards of one prediction, or if
            `output` is in it.
        OSError: If the file cannot be written.
    """
    if output is not None and output.parent.resolve() == folder.resolve():
        raise ValueError(
            f"`output={str(output)!r}` is in the folder of `merge`. Set a file in another folder"
        )
    metadata = check_shards(folder)
    num_images = sum(fields["images"] for fields in metadata)
    num_failed = sum(fields["failed"] for fields in metadata)
    if output is not None:
        write_table(
            pa.concat_tables(pq.read_table(file) for file in list_shards(folder)[0]), output
        )
    return f"{output or folder}: {num_images:,} images, {num_failed:,} without a prediction"
