"""Folders of Parquet files (`vitcls predict --output FOLDER`), written by any number of jobs without communication.

    shard-000003.parquet           images 3 * shard_size, ... of a list or a dataset
    shard-0001-000003.parquet      the fourth file of worker 1, for a stream

A job `--shard i/n` with p processes has p of the n * p workers. Each shard is written atomically by one worker. The
metadata of every file contains the settings of the prediction, so a repeated command skips finished shards and refuses
files of another model or input. For a stream, the metadata also contains the position from which a repeated command
continues.
"""

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.image_folder import format_name_list
from ..errors import format_error
from .outputs import Columns, get_output_columns, write_rows, write_table


METADATA_KEY = b"vitcls"


@dataclass(frozen=True)
class ShardFolder:
    """An output folder, and the settings that are stored in all of its files."""

    path: Path
    shard_size: int
    settings: dict[str, Any]

    def get_file(self, shard_index: int, worker_index: int | None = None) -> Path:
        """Return the path of a shard. `worker_index` is set for streams."""
        prefix = "" if worker_index is None else f"{worker_index:04}-"
        return self.path / f"shard-{prefix}{shard_index:06}.parquet"

    def open(self) -> None:
        """Create the folder. Raise ValueError if it contains other files, or shards with other settings."""
        self.path.mkdir(parents=True, exist_ok=True)
        shards, other_files = list_shards(self.path)
        if other_files:
            raise ValueError(f"--output {self.path} contains other files. Set a new or empty folder")
        if not shards:
            return
        stored_settings = read_metadata(shards[0])["settings"]
        for name, value in self.settings.items():
            if stored_settings.get(name) != value:
                difference = f"another {name}" if name in ("input", "model") else f"other --{name.replace('_', '-')}"
                raise ValueError(f"--output {self.path} was written with {difference}. Set a new --output folder")

    def read_finished(self, file: Path) -> dict[str, Any] | None:
        """Return the metadata of a finished shard, or None. Remove the partial file of a process that was killed."""
        if file.exists():
            return read_metadata(file)
        for unfinished_file in self.path.glob(f".{file.name}.*.unfinished"):
            unfinished_file.unlink()
        return None

    def write(self, file: Path, rows: list[dict[str, Any]], columns: Columns, **fields: Any) -> dict[str, Any]:
        """Write a shard, and return its metadata. `fields` are added to the metadata."""
        num_failed = sum(row["error"] is not None for row in rows)
        metadata = {"settings": self.settings, "images": len(rows), "failed": num_failed, **fields}
        write_rows(rows, get_output_columns(columns), file, {METADATA_KEY.decode(): json.dumps(metadata)})
        return metadata


def list_shard_indices(num_images: int, shard_size: int) -> list[range]:
    """Return the image indices of each shard."""
    return [range(start, min(start + shard_size, num_images)) for start in range(0, num_images, shard_size)]


def list_shards(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the shards of a folder in their order, and all other files except hidden files."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    shards = [file for file in files if file.name.startswith("shard-") and file.suffix == ".parquet"]
    return shards, [file for file in files if file not in shards]


def read_metadata(file: Path) -> dict[str, Any]:
    """Return the metadata of a shard. Raise ValueError if the file is damaged."""
    try:
        metadata = pq.read_metadata(file)
        fields = json.loads(metadata.metadata[METADATA_KEY])
        if fields["images"] != metadata.num_rows:
            raise ValueError(f"{metadata.num_rows} of {fields['images']} rows")
        return fields
    except Exception as error:  # pyarrow raises several types of errors
        raise ValueError(f"{file} is damaged ({format_error(error)}). Delete the file, and repeat") from error


def find_missing_shards(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of the missing shards of a folder, and the metadata of the existing shards. Raise ValueError if
    the folder has no shards, or shards of different predictions."""
    shards, _ = list_shards(folder) if folder.is_dir() else ([], [])
    if not shards:
        raise ValueError(f"{folder} contains no shards. Set --merge to the --output folder of `vitcls predict`")
    metadata = {file.name: read_metadata(file) for file in shards}
    first = next(iter(metadata.values()))
    for name, fields in metadata.items():
        if fields["settings"] != first["settings"]:
            raise ValueError(f"{folder / name} was written with other flags than {shards[0].name}. Delete the file")
    if "num_shards" in first:
        expected = [f"shard-{index:06}.parquet" for index in range(first["num_shards"])]
    else:  # of a stream: one file after the existing files of each worker, unless the last one is complete
        expected = []
        for worker in range(first["settings"]["num_workers"]):
            names = (f"shard-{worker:04}-{index:06}.parquet" for index in count())
            name = next(name for name in names if name not in metadata or metadata[name]["is_last"])
            expected.append(name)
    return [name for name in expected if name not in metadata], list(metadata.values())


def merge_shards(folder: Path, output: Path | None) -> str:
    """Write the rows of all shards to one file, if `output` is set. Return a line of text with the number of images.
    Raise ValueError with the names of the missing shards if the folder is not complete."""
    missing, metadata = find_missing_shards(folder)
    if missing:
        names = format_name_list(missing)
        raise ValueError(f"{folder} lacks {len(missing)} shards: {names}. Repeat the commands that write them")
    num_images, num_failed = (sum(fields[name] for fields in metadata) for name in ("images", "failed"))
    if output is not None:
        write_table(pa.concat_tables(pq.read_table(file) for file in list_shards(folder)[0]), output)
    return f"{output or folder}: {num_images:,} images, {num_failed:,} without a prediction"
