"""Load the splits of the dataset in `--dataset`.

    digits                1,797 handwritten digits of 8 x 8 pixels from scikit-learn, in memory
    a folder of idx files MNIST, Fashion-MNIST and other datasets in this format, in memory
    an image folder       a subfolder per class, or metadata.csv; read by image_folder.py
    CSV, JSON Lines,      a file, or a folder with a file per split; read by the `datasets` library, offline
    Parquet
    saved with `datasets` a folder written by `save_to_disk`
    memory:...            a dataset in memory (in_memory.py)
    anything else         the id of a dataset on the Hub

Held-out images are selected in held_out.py. Streamed datasets are read in streaming.py.
"""

import gzip
import logging
import os
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..hub.loading import describe_missing_repo, fall_back_to_cache, is_hub_id
from ..model.heads_vitcls import IGNORED_LABEL
from ..runtime.errors import format_error
from .image_folder import explain_reading_errors, read_image_folder, scan_folder
from .images import ArrayImages, DatasetImages, LabeledImages
from .in_memory import MEMORY_PREFIX, get_dataset
from .labels import (
    UNLABELED,
    LabelSpace,
    build_label_reader,
    describe_similar_labels,
    find_image_column,
    is_image_feature,
)
from .options import DataOptions


READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
}

IDX_SPLITS = {"train": "train", "t10k": "test"}
IDX_CLASSES = {
    "fashion-mnist": (
        "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
    ),
}

logger = logging.getLogger(__name__)

# names of all splits -> names of the splits to read
SplitSelector = Callable[[list[str]], Collection[str]]


@dataclass(frozen=True)
class Splits:
    """The name, label space and selected splits of a dataset."""

    name: str
    label_space: LabelSpace
    images_by_split: Mapping[str, Any]  # values: `LabeledImages` or `StreamedImages` (streaming.py)
    names: list[str]  # names of all splits


def load_splits(
    options: DataOptions, use_labels: bool = True, select: SplitSelector = list
) -> Splits:
    """Load the splits of `dataset`.

    Args:
        use_labels: whether labels are read. If False, every label is -100, and no label column is
            required.
        select: function that selects splits by name. Other splits, whose labels may be hidden, are
            not read.

    Raises:
        ValueError: if the dataset cannot be read, or has no image or label column.
        OSError: if the dataset cannot be found.
    """
    if options.dataset == "digits":
        splits = load_digits()
    elif is_idx_folder(Path(options.dataset)):
        splits = load_idx_folder(Path(options.dataset))
    else:
        return load_with_datasets(options, use_labels, select)

    check_columns_not_set(options, splits.label_space)
    images_by_split = {name: splits.images_by_split[name] for name in select(splits.names)}
    if use_labels:
        return replace(splits, images_by_split=images_by_split)
    unlabeled = {name: mark_as_unlabeled(split.images) for name, split in images_by_split.items()}
    return replace(splits, label_space=UNLABELED, images_by_split=unlabeled)


def check_columns_not_set(options: DataOptions, label_space: LabelSpace) -> None:
    """Raise ValueError for flags of columns and labels other than the only ones of a dataset."""
    only_values = {
        "image_column": "image",
        "label_column": tuple(label_space.columns),
        "label_separator": None,
        "label_names": tuple(label_space.names),
    }
    for name, only_value in only_values.items():
        value = getattr(options, name)
        if value not in (None, only_value):
            raise ValueError(
                f"`{name}` has no effect on {options.dataset}, whose images and labels are not in "
                f"a table. Remove `{name}`"
            )


def mark_as_unlabeled(images: Any) -> LabeledImages:
    """Return `LabeledImages` with the label -100 for every image."""
    return LabeledImages(images, [IGNORED_LABEL] * len(images))


# In memory ----------------------------------------------------------------------------------------


def load_digits() -> Splits:
    """Load the handwritten digits from scikit-learn: images of 8 x 8 pixels with 17 gray levels."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    gray_levels = (digits.images * (255 / 16)).round().astype(np.uint8)  # [1797, 8, 8]
    label_space = LabelSpace(
        "single_label_classification", {"label": [str(name) for name in digits.target_names]}
    )
    images = LabeledImages(ArrayImages(gray_levels), digits.target.tolist())
    return Splits("digits", label_space, {"train": images}, ["train"])


def is_idx_folder(folder: Path) -> bool:
    """Return whether a folder contains images in the MNIST format."""
    return any(find_idx_file(folder, split, "images-idx3") for split in IDX_SPLITS)


def find_idx_file(folder: Path, split: str, kind: str) -> Path | None:
    """Return the path of a plain or compressed file in the MNIST format, or None."""
    files = (folder / f"{split}-{kind}-ubyte{suffix}" for suffix in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def load_idx_folder(folder: Path) -> Splits:
    """Load the splits of a folder in the MNIST format.

    Raise ValueError if a label file is missing, or if a file is damaged.
    """
    images_by_split = {}
    num_classes = 10

    for prefix, name in IDX_SPLITS.items():
        image_file, label_file = (
            find_idx_file(folder, prefix, kind) for kind in ("images-idx3", "labels-idx1")
        )
        if image_file is None:
            continue
        if label_file is None:
            raise ValueError(
                f"{folder} has no file {prefix}-labels-idx1-ubyte. Download the files again"
            )

        images = read_idx(image_file, num_dimensions=3)
        labels = read_idx(label_file, num_dimensions=1)
        if len(images) != len(labels):
            raise ValueError(
                f"{image_file} has {len(images)} images, but {len(labels)} labels. Download both "
                "files"
            )
        num_classes = max(num_classes, int(labels.max(initial=0)) + 1)
        images_by_split[name] = LabeledImages(ArrayImages(images), labels.tolist())

    name = folder.resolve().name
    classes = IDX_CLASSES.get(name, [str(index) for index in range(num_classes)])
    label_space = LabelSpace("single_label_classification", {"label": classes})
    return Splits(name, label_space, images_by_split, list(images_by_split))


def read_idx(file: Path, num_dimensions: int) -> np.ndarray:
    """Read an idx file as [images, H, W] or [images] `uint8`.

    The file contains two zero bytes, the type code 8 (`uint8`), the number of dimensions, the size
    of each dimension, and the values.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if content[:4] != bytes([0, 0, 8, num_dimensions]):
            raise ValueError("the header of the file is not valid")
        shape = struct.unpack_from(f">{num_dimensions}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(
            f"cannot read {file} as a file in the MNIST format: {format_error(error)}"
        ) from error


# Read by `datasets`
# --------------------------------------------------------------------------------------------------


def load_with_datasets(options: DataOptions, use_labels: bool, select: SplitSelector) -> Splits:
    """Use the `datasets` library to load the splits of a folder, a file or a dataset on the Hub."""
    all_splits = open_splits(options, use_labels)
    datasets = {split: all_splits[split] for split in select(list(all_splits))}
    features = next(iter(datasets.values())).features
    image_column = find_image_column(options, features)
    folder = get_dataset_folder(options.dataset)
    name = get_dataset_name(options.dataset)
    images_by_split = {
        split: build_images(dataset, image_column, folder) for split, dataset in datasets.items()
    }
    if not use_labels:
        unlabeled = {split: mark_as_unlabeled(each) for split, each in images_by_split.items()}
        return Splits(name, UNLABELED, unlabeled, list(all_splits))

    def read_all(column: str) -> Iterable[Any]:
        return chain.from_iterable(read_column(dataset, column) for dataset in datasets.values())

    reader = build_label_reader(options, features, read_all)
    for warning in describe_similar_labels(reader.label_space):
        warn_on_first_process(f"WARNING: {options.dataset}: {warning}")
    labeled_splits = {}
    for split, dataset in datasets.items():
        name_row = partial("{}, split {!r}: row {}".format, options.dataset, split)
        labels = reader.read_columns(
            [read_column(dataset, column.name) for column in reader.columns], name_row
        )
        labeled_splits[split] = drop_unlabeled_images(
            LabeledImages(images_by_split[split], labels), f"{options.dataset}, split {split!r}"
        )
    return Splits(name, reader.label_space, labeled_splits, list(all_splits))


def drop_unlabeled_images(images: LabeledImages, name: str) -> LabeledImages:
    """Return the labeled images and log a warning about images without a label.

    `name` is that of the split. Raise ValueError if no image has a label.
    """
    if not isinstance(images.labels, list):
        return images
    labeled = [index for index, label in enumerate(images.labels) if label != IGNORED_LABEL]
    if len(labeled) == len(images):
        return images

    if not labeled:
        raise ValueError(
            f"{name}: no image has a label. Set a different `label_column`, or add labels"
        )
    warn_on_first_process(
        f"{name}: skipped {len(images) - len(labeled):,} of {len(images):,} images (no label)"
    )
    return images.select(labeled)


@cache
def warn_on_first_process(message: str) -> None:
    """Log a warning once, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", message)


def open_splits(options: DataOptions, use_labels: bool) -> Any:
    """Return the splits of a dataset by name, as `datasets` objects.

    With `streaming`, no rows are read yet. Raise ValueError if the dataset cannot be read, and
    OSError if the dataset is found neither locally nor on the Hub.
    """
    path = Path(options.dataset)
    is_in_memory = options.dataset.startswith(MEMORY_PREFIX)
    if options.streaming and (is_in_memory or options.dataset == "digits" or is_idx_folder(path)):
        raise ValueError(f"{options.dataset} is always loaded into memory. Remove `streaming=True`")

    if is_in_memory:
        return get_dataset(options.dataset)
    if path.is_dir() and (folder := scan_folder(path)).is_image_folder:
        image_splits = read_image_folder(folder, use_labels)
        for note in folder.notes:
            warn_on_first_process(note)
        for warning in folder.warnings:
            warn_on_first_process(f"WARNING: {warning}")
        return convert_to_streams(image_splits, options)
    if path.suffix in READERS or path.exists():
        return read_with_datasets(options)

    if not is_hub_id(options.dataset):
        raise OSError(describe_missing_repo(options.dataset, "dataset"))
    # without the fallback, `datasets` retries for almost a minute
    with fall_back_to_cache(options.dataset, "dataset"):
        return read_with_datasets(options)


def read_with_datasets(options: DataOptions) -> Any:
    """Load a dataset with the `datasets` library.

    Raise a one-line ValueError if the dataset cannot be read.
    """
    import datasets

    path = Path(options.dataset)
    with explain_reading_errors(options.dataset):
        if path.suffix in READERS:
            reader = READERS[path.suffix]
            arguments = {"sep": "\t"} if path.suffix == ".tsv" else {}
            return datasets.load_dataset(
                reader, data_files=str(path), streaming=options.streaming, **arguments
            )
        # written by `save_to_disk`
        if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(path)
            return convert_to_streams(
                saved if isinstance(saved, dict) else {"train": saved}, options
            )
        return datasets.load_dataset(options.dataset, streaming=options.streaming)


def convert_to_streams(splits: Any, options: DataOptions) -> Any:
    """Return the splits, converted to streams if `streaming` is set."""
    if not options.streaming:
        return splits
    return {name: split.to_iterable_dataset() for name, split in splits.items()}


def get_dataset_name(dataset: str) -> str:
    """Return the name of the dataset: the file or folder name, or the id on the Hub."""
    path = Path(dataset)
    return path.resolve().name if path.exists() else dataset


def get_dataset_folder(dataset: str) -> Path:
    """Return the folder to which image paths are relative."""
    if dataset.startswith(MEMORY_PREFIX):
        return Path("/")
    path = Path(dataset)
    return path.parent if path.suffix in READERS else path


def read_column(dataset: Any, column: str) -> list[Any]:
    """Return all values of one column."""
    return dataset.select_columns([column])[:][column]


def build_images(dataset: Any, column: str, folder: Path) -> DatasetImages:
    """Return the images of one split.

    The column contains encoded images, or paths relative to `folder`.
    """
    import datasets

    images = dataset.select_columns([column])
    if is_image_feature(dataset.features[column]):
        images = images.cast_column(column, datasets.Image(decode=False))
    return DatasetImages(images, folder)
