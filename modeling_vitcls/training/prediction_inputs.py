"""Where the images of a prediction come from: each gets a number, a name, and content that is not decoded yet.

    PATHS, --list, digits             Listed      known at the start
    a data set in files of its own    Rows        read by the `datasets` library, in any order
    --streaming                       Stream      read once from its beginning; what is not wanted is passed by

All are read in ranges of increasing numbers, so that several processes, and a second start, each take their part.
Decoding is in prediction_decoding.py.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from .options import PredictOptions


IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)  # of files to take from folders; a file that is named itself is always tried
READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "pixel_values", "file_name", "filename", "file", "path")
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
    if options.dataset == "digits":
        return digits()
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
        """Their names, as a digest."""
        digest = hashlib.sha256(json.dumps(list(self.names)).encode())
        return {"images": self.num_images, "sha256 of their names": digest.hexdigest()}

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
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    paths = [line for line in lines if line.strip()]
    if not paths:
        raise ValueError(f"the list {file} is empty: write one path in each line")
    return paths


def readable(path: str) -> str:
    """A path as valid text, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def digits() -> Listed:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels and 17 grey levels."""
    import numpy as np
    import sklearn.datasets

    levels = (sklearn.datasets.load_digits().images * (255 / 16)).round().astype(np.uint8)  # [1797, 8, 8]
    return Listed([f"digits/{index}" for index in range(len(levels))], levels)


# Data sets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageColumn:
    """The column of a data set that holds images or their paths, and the folder that relative paths begin at."""

    name: str
    folder: Path | None

    def record(self, index: int, value: Any) -> Record:
        """One of its values, named by its path where it has one."""
        if isinstance(value, str):
            path = value if self.folder is None or "://" in value else str(self.folder / value)
            return Record(index, readable(value), path)
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
        """What was asked for, and how many rows it has."""
        return {**self.described, "images": self.num_images}

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


def open_dataset(options: PredictOptions, dataset: str) -> Rows | Stream:
    """A folder, a CSV or Parquet file, or a data set of the Hub.

    Raises:
        ValueError: if it cannot be found or read, has several splits and none is named, or no column of images.
    """
    part = load_split(options, dataset)
    path = Path(dataset)
    folder = path.parent if path.is_file() else None
    column = ImageColumn(find_image_column(options, part), folder)
    described: dict[str, Any] = {"dataset": options.dataset, "split": options.split, "column": column.name}
    if path.is_file():
        described["bytes"] = path.stat().st_size
    part = undecoded(part.select_columns([column.name]), column.name)
    if options.streaming:
        return Stream(part, column, described)
    if not len(part):
        raise ValueError(f"the data set {options.dataset} is empty")
    return Rows(part, column, described)


def load_split(options: PredictOptions, dataset: str) -> Any:
    """The split that is asked for, or the only one."""
    import datasets

    path = Path(dataset)
    try:
        if path.suffix in READERS:
            separator = {"sep": "\t"} if path.suffix == ".tsv" else {}
            files = {"data_files": str(path), **separator}
            parts = datasets.load_dataset(READERS[path.suffix], streaming=options.streaming, **files)
        else:
            parts = datasets.load_dataset(dataset, streaming=options.streaming)
    except Exception as error:  # the readers raise almost anything on broken data
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot read the data set {options.dataset!r} ({type(error).__name__}: {reason}): give `digits`, a "
            "folder, a CSV or Parquet file, or the id of a data set on the Hub"
        ) from error
    if options.split is None and len(parts) == 1:
        return next(iter(parts.values()))
    if options.split not in parts:
        asked = "has several splits" if options.split is None else f"has no split {options.split!r}"
        raise ValueError(f"{options.dataset} {asked}: set --split to one of {', '.join(parts)}")
    return parts[options.split]


def find_image_column(options: PredictOptions, part: Any) -> str:
    """The column that is asked for, the only one of pictures, or the first with a usual name."""
    columns = columns_of(part)
    if options.image_column is not None:
        if options.image_column not in columns:
            raise ValueError(
                f"{options.dataset} has no column {options.image_column!r}: choose one of {', '.join(columns)}"
            )
        return options.image_column
    pictures = [name for name, feature in columns.items() if is_picture(feature)]
    if len(pictures) == 1:
        return pictures[0]
    for name in IMAGE_COLUMNS:
        if name in (pictures or columns):
            return name
    raise ValueError(
        f"{options.dataset}: no column is clearly the image (it has {', '.join(columns)}): name it with --image-column"
    )


def columns_of(part: Any) -> dict[str, Any]:
    """The columns with their types; a stream that declares none is asked for its first row."""
    if part.features is not None:
        return part.features
    return dict.fromkeys(next(iter(part), {}))


def is_picture(feature: Any) -> bool:
    """Whether a column of `datasets` holds pictures rather than paths."""
    is_encoded = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    return type(feature).__name__ == "Image" or is_encoded or getattr(feature, "dtype", None) == "binary"


def undecoded(part: Any, column: str) -> Any:
    """The data set with its pictures as they are stored: only those that are wanted are decoded, and in parallel."""
    import datasets

    is_image = type((part.features or {}).get(column)).__name__ == "Image"
    return part.cast_column(column, datasets.Image(decode=False)) if is_image else part
