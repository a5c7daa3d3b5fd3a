"""Where the images of a prediction come from: each gets a number, a name, and content that is not decoded yet.

    PATHS, --list, digits, MNIST's files    Listed    known at the start
    other data sets                         Rows      read by the `datasets` library, in any order
    --streaming                             Stream    read once from its beginning; what is not wanted is passed by

All are read in ranges of increasing numbers, so that several processes, and a second start, each take their part.
Decoding is in inputs.py.

From image records to the image processor's pixels, on several threads, ahead of the model.

Threads rather than processes: decoding and resizing run outside Python's lock, and nothing has to be sent. On two
cores they prepared JPEG files of 500 x 375 pixels 1.3 times as fast as two processes.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from ..data.columns import Features, find_image_column
from ..data.image_folder import IMAGE_SUFFIXES
from ..data.images import Arrays, path_in
from ..data.sources import folder_of, is_idx_folder, load_splits, open_with_datasets
from ..data.streaming import features_of
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..options import DataOptions, PredictOptions


ROWS_AT_ONCE = 64  # of encoded images read from disk


@dataclass(frozen=True)
class Record:
    """One image: its number in the input, what to call it, and its content.

    The content is a path, a URL, encoded bytes, anything that the image processor takes, or None if it is missing.
    """

    index: int
    name: str
    content: Any


class Source(Protocol):
    """Images by number."""

    @property
    def num_images(self) -> int | None:
        """How many there are; None for a stream whose end has not been seen."""

    def identity(self) -> dict[str, Any]:
        """What tells this input from another, in values that JSON knows."""

    def read(self, ranges: Iterable[range]) -> Iterator[Record]:
        """The images of disjoint, increasing ranges."""


def open_source(options: PredictOptions) -> Source:
    """What PATHS, `--list` or `--dataset` name.

    Raises:
        ValueError: for an input without images, or a data set that cannot be read.
        OSError: for a list that cannot be read.
    """
    if options.dataset is not None:
        return open_dataset(options, options.dataset)
    lines = list(options.paths) if options.list is None else read_list(options.list)
    return listed_files(lines)


# Listed --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """Images that are known at the start."""

    names: Sequence[str]
    contents: Sequence[Any]

    @property
    def num_images(self) -> int:
        """How many there are."""
        return len(self.names)

    def identity(self) -> dict[str, Any]:
        """Names of all, with sizes and times of files and the values of arrays, as a digest."""
        digest = hashlib.sha256(json.dumps(list(self.names)).encode())
        if isinstance(self.contents, Arrays):
            digest.update(self.contents.values.tobytes())
        else:
            digest.update(json.dumps([size_and_time(content) for content in self.contents]).encode())
        return {"images": self.num_images, "sha256": digest.hexdigest()}

    def read(self, ranges: Iterable[range]) -> Iterator[Record]:
        """The images of these ranges."""
        for indices in ranges:
            for index in indices:
                yield Record(index, self.names[index], self.contents[index])


def listed_files(paths: Iterable[str]) -> Listed:
    """Files and URLs as they are, folders as all images in them, sorted by name.

    Raises:
        ValueError: if there are none.
    """
    files = [file for path in paths for file in (files_in(path) if Path(path).is_dir() else [path])]
    if not files:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"there are no images in {', '.join(paths)}: folders are searched for files named {suffixes}")
    return Listed([readable(file) for file in files], files)


def files_in(folder: str) -> Iterator[str]:
    """The images in a folder and all folders in it; hidden ones are left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield str(Path(parent, name))


def read_list(file: Path) -> list[str]:
    """The lines of a text file, without empty ones."""
    lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    paths = [path for line in lines if (path := line.removesuffix("\r")).strip()]
    if not paths:
        raise ValueError(f"the list {file} is empty: write one path in each line")
    return paths


def size_and_time(path: str) -> list[int] | None:
    """Bytes of a file, and when it was last modified, in nanoseconds; None for a URL or what cannot be found."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


def readable(path: str) -> str:
    """A path as valid text, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", errors="replace")


# Data sets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageColumn:
    """The column of a data set that holds images or their paths, and the folder that relative paths begin at."""

    name: str
    folder: Path

    def record(self, index: int, value: Any) -> Record:
        """One of its values, named by its path where it has one."""
        if isinstance(value, str):
            return Record(index, readable(value), path_in(self.folder, value))
        if isinstance(value, dict):
            name, encoded = value.get("path"), value.get("bytes")
            return Record(index, readable(name or str(index)), name if encoded is None else encoded)
        return Record(index, str(index), value)


@dataclass(frozen=True)
class Rows:
    """The rows of a data set on disk."""

    part: Any  # datasets.Dataset
    column: ImageColumn
    described: dict[str, Any]

    @property
    def num_images(self) -> int:
        """How many there are."""
        return len(self.part)

    def identity(self) -> dict[str, Any]:
        """What was asked for, how many rows it has, and the mark that `datasets` gave its content."""
        return {**self.described, "images": self.num_images, "fingerprint": self.part._fingerprint}

    def read(self, ranges: Iterable[range]) -> Iterator[Record]:
        """The images of these ranges."""
        for indices in ranges:
            for start in range(indices.start, indices.stop, ROWS_AT_ONCE):
                values = self.part[start : min(start + ROWS_AT_ONCE, indices.stop)][self.column.name]
                for index, value in enumerate(values, start):
                    yield self.column.record(index, value)


@dataclass
class Stream:
    """A data set that is read while predicting, from its beginning to the last range or to its end."""

    examples: Any  # datasets.IterableDataset
    column: ImageColumn
    described: dict[str, Any]
    num_images: int | None = None

    def identity(self) -> dict[str, Any]:
        """What was asked for."""
        return self.described

    def read(self, ranges: Iterable[range]) -> Iterator[Record]:
        """The images of these ranges, as far as there are any; at its end, `num_images` is known."""
        examples = iter(self.examples)
        position = 0
        for indices in ranges:
            position += sum(1 for _ in islice(examples, indices.start - position))  # passed by, not decoded
            for example in islice(examples, indices.stop - position):
                yield self.column.record(position, example[self.column.name])
                position += 1
            if position < indices.stop:
                self.num_images = position
                return


def open_dataset(options: PredictOptions, dataset: str) -> Source:
    """A data set as scripts/finetune.py reads it; labels are not needed.

    Raises:
        ValueError: if it cannot be found or read, has several splits and none is named, or no column of images.
    """
    data = DataOptions(dataset, image_column=options.image_column, streaming=options.streaming)
    path = Path(dataset)
    if not options.streaming and (dataset == "digits" or is_idx_folder(path)):
        pictures = chosen_split(load_splits(data, labelled=False).parts, options).pictures
        return Listed([f"{path.name}/{index}" for index in range(len(pictures))], pictures)

    part = chosen_split(open_with_datasets(data, labelled=False), options)
    features = features_of(part, data)
    column = ImageColumn(find_image_column(data, features), folder_of(data))
    described: dict[str, Any] = {"dataset": dataset, "split": options.split, "column": column.name}
    if path.is_file():
        described["bytes and time"] = size_and_time(dataset)
    part = undecoded(part.select_columns([column.name]), column.name, features)
    if options.streaming:
        return Stream(part, column, described)
    if not len(part):
        raise ValueError(f"the data set {dataset} is empty")
    return Rows(part, column, described)


def chosen_split(parts: Mapping[str, Any], options: PredictOptions) -> Any:
    """The split that is asked for, or the only one."""
    if options.split is None and len(parts) == 1:
        return next(iter(parts.values()))
    if options.split is None or options.split not in parts:
        asked = "has several splits" if options.split is None else f"has no split {options.split!r}"
        raise ValueError(f"{options.dataset} {asked}: set --split to one of {', '.join(parts)}")
    return parts[options.split]


def undecoded(part: Any, column: str, features: Features) -> Any:
    """The data set with its pictures as they are stored: only those that are wanted are decoded, and in parallel."""
    import datasets

    is_decoding = isinstance(features[column], datasets.Image)
    return part.cast_column(column, datasets.Image(decode=False)) if is_decoding else part


@dataclass(frozen=True)
class Prepared:
    """An image ready for the model, [C, H, W], or why there is none."""

    record: Record
    pixels: torch.Tensor | None = None
    error: str | None = None


class CannotFetch(OSError):
    """A failure of the network, which ends the run: a row would make it look like a broken image."""


def prepared_ahead(
    records: Iterator[Record], processor: ViTCLSImageProcessor, num_workers: int, num_ahead: int
) -> Iterator[Prepared]:
    """The records in their order, prepared by `num_workers` threads, `num_ahead` of them before they are asked for."""
    pool = ThreadPoolExecutor(num_workers)
    waiting: deque[Future[Prepared]] = deque()
    try:
        for record in records:
            waiting.append(pool.submit(partial(prepare, processor), record))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(processor: ViTCLSImageProcessor, record: Record) -> Prepared:
    """Read, decode and process one image."""
    try:
        picture = source_of(record)
        pixels = processor(picture, return_tensors="pt")["pixel_values"][0]  # [C, H, W]
    except CannotFetch:
        raise
    except (ValueError, OSError) as error:
        return Prepared(record, error=in_one_line(error))
    return Prepared(record, pixels)


def in_one_line(error: Exception) -> str:
    """Its message as valid text of one line, whatever bytes a file name in it has."""
    message = " ".join(str(error).split())
    return message.encode("utf-8", errors="replace").decode()


def source_of(record: Record) -> Any:
    """What the image processor reads, and names if it cannot.

    Raises:
        ValueError: if there is no image.
        CannotFetch: if a data set's file cannot be read over the network.
    """
    content = record.content
    if content is None:
        raise ValueError(f"there is no image in row {record.index}")
    if isinstance(content, str) and "://" in content and not content.startswith(("http://", "https://")):
        content = fetch(content)
    return content


def fetch(address: str) -> bytes:
    """The content of a file of a streamed data set (`hf://`, `s3://`, a member of an archive)."""
    import fsspec

    try:
        with fsspec.open(address, "rb") as file:
            return file.read()
    except Exception as error:  # each file system has its own
        reason = " ".join(str(error).split())
        raise CannotFetch(
            f"cannot fetch {address} ({type(error).__name__}: {reason}): start again to go on"
        ) from error
