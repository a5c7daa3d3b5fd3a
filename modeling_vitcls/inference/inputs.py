"""Inputs of a prediction: image records with an index, a name and undecoded content, and their preprocessing.

    PATHS, --list, digits, MNIST files    Listed    known at the start
    other datasets                        Rows      read by the `datasets` library, in any order
    --streaming                           Stream    read once from the beginning; other images are skipped

All inputs are read in ranges of increasing indices, so that several processes or a restarted prediction can each read
a part. Several threads decode and preprocess the images ahead of the model.

Threads are faster than processes here, because decoding and resizing release the GIL and no data is copied between
processes. On two cores, two threads prepared JPEG files of 500 x 375 pixels 1.3 times as fast as two processes.
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


ROWS_AT_ONCE = 64  # number of encoded images that are read from disk at once


@dataclass(frozen=True)
class Record:
    """One image: its index in the input, its name and its content.

    The content is a path, a URL, encoded bytes, any other input of the image processor, or None if it is missing.
    """

    index: int
    name: str
    content: Any


class Source(Protocol):
    """Images by index."""

    @property
    def num_images(self) -> int | None:
        """Number of images; None for a stream whose end has not been reached."""

    def identity(self) -> dict[str, Any]:
        """Return JSON values that identify the input."""

    def read(self, ranges: Iterable[range]) -> Iterator[Record]:
        """Yield the images of disjoint, increasing ranges."""


def open_source(options: PredictOptions) -> Source:
    """Open the input that PATHS, `--list` or `--dataset` name.

    Raises:
        ValueError: if the input has no images, or a dataset cannot be read.
        OSError: if the list cannot be read.
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
        """Return the number of images and a digest of names, file sizes and times, and array values."""
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
    """Return files and URLs unchanged, and folders replaced by the images in them, sorted by name.

    Raises:
        ValueError: if there are no images.
    """
    files = [file for path in paths for file in (files_in(path) if Path(path).is_dir() else [path])]
    if not files:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"there are no images in {', '.join(paths)}: folders are searched for files named {suffixes}")
    return Listed([readable(file) for file in files], files)


def files_in(folder: str) -> Iterator[str]:
    """Yield the images in a folder and its sub-folders, without hidden files and folders."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield str(Path(parent, name))


def read_list(file: Path) -> list[str]:
    """Return the non-empty lines of a text file."""
    lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    paths = [path for line in lines if (path := line.removesuffix("\r")).strip()]
    if not paths:
        raise ValueError(f"the list {file} is empty: write one path in each line")
    return paths


def size_and_time(path: str) -> list[int] | None:
    """Return the size of a file in bytes and its modification time in nanoseconds; None for a URL or missing file."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


def readable(path: str) -> str:
    """Return a path as valid text, with invalid bytes replaced."""
    return os.fsencode(path).decode("utf-8", errors="replace")


# Data sets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageColumn:
    """The column of a dataset with images or their paths, and the folder that relative paths start at."""

    name: str
    folder: Path

    def record(self, index: int, value: Any) -> Record:
        """Return the record of one value, named by its path or its index."""
        if isinstance(value, str):
            return Record(index, readable(value), path_in(self.folder, value))
        if isinstance(value, dict):
            name, encoded = value.get("path"), value.get("bytes")
            return Record(index, readable(name or str(index)), name if encoded is None else encoded)
        return Record(index, str(index), value)


@dataclass(frozen=True)
class Rows:
    """The rows of a dataset on disk."""

    part: Any  # datasets.Dataset
    column: ImageColumn
    described: dict[str, Any]

    @property
    def num_images(self) -> int:
        """How many there are."""
        return len(self.part)

    def identity(self) -> dict[str, Any]:
        """Return the options, the number of rows and the fingerprint of the `datasets` library."""
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
    """A dataset that is read during prediction, from its beginning to the last range or to its end."""

    examples: Any  # datasets.IterableDataset
    column: ImageColumn
    described: dict[str, Any]
    num_images: int | None = None

    def identity(self) -> dict[str, Any]:
        """Return the options."""
        return self.described

    def read(self, ranges: Iterable[range]) -> Iterator[Record]:
        """Yield the images of these ranges up to the end of the stream, and set `num_images` there."""
        examples = iter(self.examples)
        position = 0
        for indices in ranges:
            position += sum(1 for _ in islice(examples, indices.start - position))  # skipped, not decoded
            for example in islice(examples, indices.stop - position):
                yield self.column.record(position, example[self.column.name])
                position += 1
            if position < indices.stop:
                self.num_images = position
                return


def open_dataset(options: PredictOptions, dataset: str) -> Source:
    """Open a dataset in any format that scripts/finetune.py reads. Labels are not needed.

    Raises:
        ValueError: if the dataset cannot be found or read, has no image column, or has several splits and `--split`
            is not set.
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
    """Return the requested split, or the only split."""
    if options.split is None and len(parts) == 1:
        return next(iter(parts.values()))
    if options.split is None or options.split not in parts:
        asked = "has several splits" if options.split is None else f"has no split {options.split!r}"
        raise ValueError(f"{options.dataset} {asked}: set --split to one of {', '.join(parts)}")
    return parts[options.split]


def undecoded(part: Any, column: str, features: Features) -> Any:
    """Return the dataset with encoded images, so that only the requested images are decoded, in parallel."""
    import datasets

    is_decoding = isinstance(features[column], datasets.Image)
    return part.cast_column(column, datasets.Image(decode=False)) if is_decoding else part


@dataclass(frozen=True)
class Prepared:
    """The preprocessed pixels of an image, [C, H, W], or an error message."""

    record: Record
    pixels: torch.Tensor | None = None
    error: str | None = None


class CannotFetch(OSError):
    """A network error. It stops the run, because a row with an error would look like an unreadable image."""


def prepared_ahead(
    records: Iterator[Record], processor: ViTCLSImageProcessor, num_workers: int, num_ahead: int
) -> Iterator[Prepared]:
    """Yield the records in order, prepared by `num_workers` threads, up to `num_ahead` records ahead."""
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
    """Return an error message as one line of valid text. Invalid bytes in file names are replaced."""
    message = " ".join(str(error).split())
    return message.encode("utf-8", errors="replace").decode()


def source_of(record: Record) -> Any:
    """Return the input of the image processor, which contains the name of the image for error messages.

    Raises:
        ValueError: if there is no image.
        CannotFetch: if a file of a dataset cannot be read over the network.
    """
    content = record.content
    if content is None:
        raise ValueError(f"there is no image in row {record.index}")
    if isinstance(content, str) and "://" in content and not content.startswith(("http://", "https://")):
        content = fetch(content)
    return content


def fetch(address: str) -> bytes:
    """Return the content of a file of a streamed dataset (`hf://`, `s3://`, a member of an archive)."""
    import fsspec

    try:
        with fsspec.open(address, "rb") as file:
            return file.read()
    except Exception as error:  # each file system raises its own types of errors
        reason = " ".join(str(error).split())
        raise CannotFetch(f"cannot fetch {address} ({type(error).__name__}: {reason}): restart to continue") from error
