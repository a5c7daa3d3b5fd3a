"""Datasets by name: `--dataset` -> splits.

    digits                1,797 handwritten digits of 8 x 8 pixels from scikit-learn, in memory
    a folder of idx files MNIST, Fashion-MNIST and other datasets in this format, in memory
    an image folder       a sub-folder per class, or metadata.csv; read by image_folder.py
    CSV, JSON Lines,      a file, or a folder with a file per split; read by the `datasets` library, without network
    Parquet
    saved with `datasets` a folder that `save_to_disk` wrote
    memory:...            a data set in memory (in_memory.py)
    anything else         the id of a dataset on the Hub

Held-out images are selected in held_out.py; streamed datasets are in streaming.py.
"""

import gzip
import logging
import os
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..heads_vitcls import IGNORED_LABEL
from ..hub.loading import describe_missing_repo, fall_back_to_cache, is_hub_id
from ..image_processing_vitcls import get_first_line
from ..options import DataOptions
from .columns import UNLABELLED, build_label_reader, find_image_column, is_image
from .image_folder import read_image_folder, scan_folder
from .images import Arrays, Encoded, Files, LabelledPictures, path_in
from .in_memory import PREFIX, get_data_set
from .labels import LabelSpace


READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".parquet": "parquet"}
SAVED_FILES = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes

IDX_SPLITS = {"train": "train", "t10k": "test"}
IDX_NAMES = {
    "fashion-mnist": [
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ]
}

log = logging.getLogger(__name__)

Choice = Callable[[list[str]], Collection[str]]  # names of all splits -> names of the splits to read


@dataclass(frozen=True)
class Splits:
    """The splits of a dataset that are used, by name, and its label space."""

    name: str
    label_space: LabelSpace
    parts: dict[str, LabelledPictures]
    names: list[str]  # names of all splits


def load_splits(options: DataOptions, labelled: bool = True, used: Choice = list) -> Splits:
    """Load the splits of `--dataset`.

    Args:
        options: the data options.
        labelled: whether labels are read. Otherwise every label is -100, and no label column is needed.
        used: function that selects splits by name. Other splits, whose labels may be hidden, are not read.

    Raises:
        ValueError: if the dataset cannot be found or read, or has no image or label column. Errors of `used` are
            passed on.
    """
    if options.dataset == "digits":
        splits = load_digits()
    elif is_idx_folder(Path(options.dataset)):
        splits = load_idx_folder(Path(options.dataset))
    else:
        return load_with_datasets(options, labelled, used)
    parts = {name: splits.parts[name] for name in used(list(splits.parts))}
    if labelled:
        return replace(splits, parts=parts)
    parts = {name: without_labels(part.pictures) for name, part in parts.items()}
    return replace(splits, label_space=UNLABELLED, parts=parts)


def without_labels(pictures: Any) -> LabelledPictures:
    """Return images with the label -100 for every image."""
    return LabelledPictures(pictures, [IGNORED_LABEL] * len(pictures))


# In memory -----------------------------------------------------------------------------------------------------------


def load_digits() -> Splits:
    """Load the handwritten digits of scikit-learn: 8 x 8 pixels with 17 gray levels."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    levels = (digits.images * (255 / 16)).round().astype(np.uint8)  # [1797, 8, 8]
    space = LabelSpace("single_label_classification", {"label": [str(name) for name in digits.target_names]})
    return Splits("digits", space, {"train": LabelledPictures(Arrays(levels), digits.target.tolist())}, ["train"])


def is_idx_folder(folder: Path) -> bool:
    """Return whether a folder contains images in the MNIST format."""
    return any(idx_file(folder, split, "images-idx3") for split in IDX_SPLITS)


def idx_file(folder: Path, split: str, kind: str) -> Path | None:
    """Return the path of a file in the MNIST format, compressed or not; None if it does not exist."""
    files = (folder / f"{split}-{kind}-ubyte{ending}" for ending in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def load_idx_folder(folder: Path) -> Splits:
    """Load the splits `train` and `test` of a folder in the MNIST format.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    found = {}
    for split, name in IDX_SPLITS.items():
        images = idx_file(folder, split, "images-idx3")
        labels = idx_file(folder, split, "labels-idx1")
        if images is None:
            continue
        if labels is None:
            raise ValueError(f"{folder} has {images.name} without {split}-labels-idx1-ubyte")
        found[name] = (read_idx(images, dimensions=3), read_idx(labels, dimensions=1))
        if len(found[name][0]) != len(found[name][1]):
            raise ValueError(f"{folder}: the split {name!r} has different numbers of images and labels")
    num_classes = max(10, *(int(labels.max(initial=0)) + 1 for _, labels in found.values()))
    names = IDX_NAMES.get(folder.resolve().name, [str(index) for index in range(num_classes)])
    space = LabelSpace("single_label_classification", {"label": names[:num_classes]})
    parts = {name: LabelledPictures(Arrays(images), labels.tolist()) for name, (images, labels) in found.items()}
    return Splits(folder.resolve().name, space, parts, list(parts))


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read an idx file: two zero bytes, type 8 (`uint8`), number of dimensions, size of each dimension, values.

    Returns:
        [images, H, W] or [images] `uint8`.
    """
    opener: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rb") as stream:
            content = stream.read()
        if content[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError("its header is not valid")
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise ValueError(f"cannot read {file} as a file of MNIST's format: {get_first_line(error)}") from error


# Read by `datasets` --------------------------------------------------------------------------------------------------


def load_with_datasets(options: DataOptions, labelled: bool, used: Choice) -> Splits:
    """Load a folder, a file or a dataset on the Hub with the `datasets` library."""
    opened = open_with_datasets(options, labelled)
    loaded = {name: opened[name] for name in used(list(opened))}
    features = next(iter(loaded.values())).features
    image_column = find_image_column(options, features)
    pictures = {name: pictures_of(part, image_column, folder_of(options)) for name, part in loaded.items()}
    if not labelled:
        parts = {name: without_labels(part) for name, part in pictures.items()}
        return Splits(name_of(options), UNLABELLED, parts, list(opened))

    reader = build_label_reader(
        options, features, lambda column: (value for part in loaded.values() for value in values_of(part, column))
    )
    parts = {}
    for name, part in loaded.items():
        columns = [values_of(part, column.column) for column in reader.columns]
        labels = [
            reader.read(
                dict(zip(reader.space.columns, values, strict=True)), f"{options.dataset}, split {name!r}: row {row}"
            )
            for row, values in enumerate(zip(*columns, strict=True))
        ]
        parts[name] = LabelledPictures(pictures[name], labels)
    return Splits(name_of(options), reader.space, parts, list(opened))


def open_with_datasets(options: DataOptions, labelled: bool = True) -> Any:
    """Return the splits of a dataset by name, as `datasets` returns them. With --streaming, no rows are read yet.

    Args:
        options: the data options.
        labelled: whether labels are needed. If not, an image folder needs no class folders.

    Raises:
        ValueError: if the dataset cannot be read.
        OSError: if there is no dataset with this name, locally or on the Hub, or the Hub cannot be reached.
    """
    path = Path(options.dataset)
    in_memory = options.dataset.startswith(PREFIX)
    if options.streaming and (in_memory or options.dataset == "digits" or is_idx_folder(path)):
        raise ValueError(f"{options.dataset} fits into memory: leave out --streaming")
    if in_memory:
        return get_data_set(options.dataset)
    if path.is_dir() and (folder := scan_folder(path)).is_image_folder:
        opened = read_image_folder(folder, labelled)
        if os.environ.get("RANK", "0") == "0":  # once for all processes
            for note in folder.notes:
                log.warning("%s", note)
        return {name: part.to_iterable_dataset() for name, part in opened.items()} if options.streaming else opened
    if path.suffix in READERS or path.exists():
        with hide_progress_bars():
            return read_with_datasets(options)
    if not is_hub_id(options.dataset):
        raise OSError(describe_missing_repo(options.dataset, "dataset"))
    with fall_back_to_cache(options.dataset, "dataset"):  # without it, `datasets` retries for most of a minute
        return read_with_datasets(options)


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets` for local files, which are not downloaded."""
    import datasets

    were_hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_hidden:
            datasets.enable_progress_bars()


def read_with_datasets(options: DataOptions) -> Any:
    """Load a dataset with `datasets.load_dataset`, with one-line errors.

    Raises:
        ValueError: if the dataset cannot be found or read.
    """
    import datasets

    path = Path(options.dataset)
    try:
        if path.suffix in READERS:
            separator = {"sep": "\t"} if path.suffix == ".tsv" else {}
            return datasets.load_dataset(
                READERS[path.suffix], data_files=str(path), streaming=options.streaming, **separator
            )
        if any((path / file).is_file() for file in SAVED_FILES):
            return read_saved_data_set(path, options.streaming)
        return datasets.load_dataset(options.dataset, streaming=options.streaming)
    except Exception as error:  # the readers raise many types of errors on damaged data
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot read the data set {options.dataset!r} ({type(error).__name__}: {reason}): give `digits`, a "
            "folder with a sub-folder of images per class, a CSV, JSON Lines or Parquet file, a folder that "
            "`save_to_disk` wrote, a folder of MNIST's idx files, or the id of a data set on the Hub"
        ) from error


def read_saved_data_set(folder: Path, streaming: bool) -> Any:
    """Return the splits in a folder that `save_to_disk` wrote; a single split is "train"."""
    import datasets

    saved = datasets.load_from_disk(folder)
    parts = saved if isinstance(saved, dict) else {"train": saved}
    return {name: part.to_iterable_dataset() for name, part in parts.items()} if streaming else parts


def name_of(options: DataOptions) -> str:
    """Return the name of the dataset: the file or folder name, or the id on the Hub."""
    path = Path(options.dataset)
    return path.resolve().name if path.exists() else options.dataset


def folder_of(options: DataOptions) -> Path:
    """Return the folder that image paths are relative to."""
    path = Path(options.dataset)
    return path.parent if path.suffix in READERS else path


def values_of(part: Any, column: str) -> list[Any]:
    """Return all values of one column."""
    return part.select_columns([column])[:][column]


def pictures_of(part: Any, column: str, folder: Path) -> "Files | Encoded":
    """Return the images of one split, which are encoded in the column or named by paths relative to `folder`."""
    import datasets

    if is_image(part.features[column]):
        return Encoded(part.select_columns([column]).cast_column(column, datasets.Image(decode=False)), column, folder)
    return Files([path_in(folder, path) for path in values_of(part, column)], folder)
