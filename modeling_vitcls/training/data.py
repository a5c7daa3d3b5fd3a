"""Data sets: where labelled pictures come from, and which of them are held out.

    --dataset -> splits by name -> a training part and a held-out part

    digits                scikit-learn's 1,797 real handwritten digits of 8 x 8 pixels, in memory
    folder, CSV, Parquet  read by the `datasets` library, without network
    anything else         the id of a data set on the Hub

Pictures are decoded when they are asked for. How they become batches is in batches.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..image_processing_vitcls import read_picture
from .options import DataOptions


IMAGE_NAMES = ("image", "img", "picture", "photo", "pixel_values", "file_name", "filename", "file", "path")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "fine_label")
HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "test")

READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures with the index of each one's label."""

    pictures: Sequence[Image.Image]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, indices: Iterable[int]) -> "LabelledPictures":
        """Some of them, in the given order."""
        indices = list(indices)
        return LabelledPictures(Chosen(self.pictures, indices), [self.labels[index] for index in indices])


@dataclass(frozen=True)
class Splits:
    """A data set as it came: its splits by name, and the names of its labels."""

    name: str
    label_names: list[str]
    parts: dict[str, LabelledPictures]


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and evaluates on."""

    name: str
    label_names: list[str]
    train: LabelledPictures
    held_out: LabelledPictures
    held_out_name: str  # a split's name, or how it was made


def load_training_data(options: DataOptions) -> TrainingData:
    """A training part and a held-out part: the data set's own splits, else a stratified, seeded choice.

    Raises:
        ValueError: for a data set without images or labels, or too small to be split.
    """
    splits = load_splits(options)
    train_name = "train" if "train" in splits.parts else next(iter(splits.parts))
    train = splits.parts[train_name]
    for name in HELD_OUT_NAMES:
        if name in splits.parts and name != train_name:
            return TrainingData(splits.name, splits.label_names, train, splits.parts[name], f"split {name!r}")
    train, held_out = hold_out(train, options)
    how = f"{options.held_out_fraction:.0%}, stratified, split seed {options.split_seed}"
    return TrainingData(splits.name, splits.label_names, train, held_out, how)


def load_evaluation_data(options: DataOptions, split: str) -> tuple[list[str], LabelledPictures]:
    """Label names and one split; of a data set with a single split, `"test"` is the part that training holds out.

    Raises:
        ValueError: for a split that does not exist.
    """
    splits = load_splits(options)
    if split in splits.parts and len(splits.parts) > 1:
        return splits.label_names, splits.parts[split]
    if len(splits.parts) == 1 and split in ("train", "test"):
        train, held_out = hold_out(next(iter(splits.parts.values())), options)
        return splits.label_names, held_out if split == "test" else train
    raise ValueError(f"{splits.name} has no split {split!r}: choose one of {', '.join(splits.parts)}")


def hold_out(pictures: LabelledPictures, options: DataOptions) -> tuple[LabelledPictures, LabelledPictures]:
    """Divide into a training and a held-out part with the same share of each label; the same for the same seed."""
    from sklearn.model_selection import train_test_split

    try:
        train, held_out = train_test_split(
            range(len(pictures)),
            test_size=options.held_out_fraction,
            stratify=pictures.labels,
            random_state=options.split_seed,
        )
    except ValueError as error:
        raise ValueError(
            f"{options.dataset}: its {len(pictures)} images cannot be split with --held-out-fraction "
            f"{options.held_out_fraction} ({error})"
        ) from None
    return pictures.chosen(train), pictures.chosen(held_out)


def load_splits(options: DataOptions) -> Splits:
    """Read `--dataset`."""
    if options.dataset == "digits":
        return load_digits()
    return load_with_datasets(options)


def load_digits() -> Splits:
    """The handwritten digits that come with scikit-learn: 8 x 8 pixels of 17 grey levels."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    levels = (digits.images * (255 / 16)).round().astype(np.uint8)  # [1797, 8, 8]
    pictures = [Image.fromarray(image) for image in levels]
    names = [str(name) for name in digits.target_names]
    return Splits("digits", names, {"train": LabelledPictures(pictures, digits.target.tolist())})


def load_with_datasets(options: DataOptions) -> Splits:
    """A folder, a file, or a data set of the Hub.

    Raises:
        ValueError: if it cannot be found or read, or has no column of images or labels.
    """
    import datasets

    path = Path(options.dataset)
    try:
        if path.suffix in READERS:
            separator = {"sep": "\t"} if path.suffix == ".tsv" else {}
            loaded = datasets.load_dataset(READERS[path.suffix], data_files=str(path), **separator)
        else:
            loaded = datasets.load_dataset(options.dataset)
    except Exception as error:  # the readers raise almost anything on broken data
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot read the data set {options.dataset!r} ({type(error).__name__}: {reason}): give `digits`, a "
            "folder with a sub-folder of images per class, a CSV or Parquet file, or the id of a data set on the Hub"
        ) from error

    folder = path.parent if path.is_file() else path
    columns = next(iter(loaded.values())).features
    image_column = find_column("image", options.image_column, columns, is_image, IMAGE_NAMES, options.dataset)
    label_column = find_column("label", options.label_column, columns, is_label, LABEL_NAMES, options.dataset)
    values = {name: part.select_columns([label_column])[:][label_column] for name, part in loaded.items()}
    label_names = names_of_labels(columns[label_column], values)
    parts = {
        name: LabelledPictures(
            pictures_of(part, image_column, folder),
            indices_of_labels(columns[label_column], values[name], label_names, f"{options.dataset}, split {name!r}"),
        )
        for name, part in loaded.items()
    }
    return Splits(path.name if path.exists() else options.dataset, label_names, parts)


# Columns -------------------------------------------------------------------------------------------------------------


def find_column(
    kind: str, asked: str | None, columns: dict[str, Any], matches: Any, usual_names: tuple[str, ...], dataset: str
) -> str:
    """The column of this kind: the one asked for, the only one of its type, or the first with a usual name."""
    if asked is not None:
        if asked not in columns:
            raise ValueError(f"{dataset} has no column {asked!r}: choose one of {', '.join(columns)}")
        return asked
    by_type = [name for name, feature in columns.items() if matches(feature)]
    if len(by_type) == 1:
        return by_type[0]
    by_name = [name for name in usual_names if name in (by_type or columns)]
    if by_name:
        return by_name[0]
    raise ValueError(
        f"{dataset}: no column is clearly the {kind} (it has {', '.join(columns)}): name it with --{kind}-column"
    )


def is_image(feature: Any) -> bool:
    """Whether a column of `datasets` holds pictures rather than paths."""
    is_encoded = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    return type(feature).__name__ == "Image" or is_encoded or getattr(feature, "dtype", None) == "binary"


def is_label(feature: Any) -> bool:
    """Whether a column of `datasets` is declared to hold class labels."""
    return type(feature).__name__ == "ClassLabel"


def names_of_labels(feature: Any, values: dict[str, list[Any]]) -> list[str]:
    """The declared names, else the distinct values of all splits in their natural order."""
    if is_label(feature):
        return list(feature.names)
    distinct = {value for part in values.values() for value in part if value is not None}
    if any(isinstance(value, float | list | dict) for value in distinct):
        raise ValueError("the label column holds no class labels: name the right one with --label-column")
    return [str(value) for value in sorted(distinct)]


def indices_of_labels(feature: Any, values: list[Any], names: list[str], where: str) -> list[int]:
    """Labels as indices into `names`; those of a declared column are indices already."""
    index_of = {key: index for index, key in enumerate(range(len(names)) if is_label(feature) else names)}
    keys = values if is_label(feature) else [str(value) for value in values]
    for row, key in enumerate(keys):
        if key not in index_of:
            raise ValueError(f"{where}: row {row} has the label {key!r}, which is none of the {len(names)} classes")
    return [index_of[key] for key in keys]


# Pictures ------------------------------------------------------------------------------------------------------------


def pictures_of(part: Any, column: str, folder: Path) -> Sequence[Image.Image]:
    """The pictures of one split: encoded in it, or named by paths relative to the file that lists them."""
    import datasets

    if is_image(part.features[column]):
        return Encoded(part.select_columns([column]).cast_column(column, datasets.Image()), column)
    paths = part.select_columns([column])[:][column]
    return Files([str(folder / path) for path in paths])


@dataclass(frozen=True)
class Chosen(Sequence):
    """Some elements of another sequence."""

    elements: Sequence[Image.Image]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.elements[self.indices[index]]


@dataclass(frozen=True)
class Files(Sequence):
    """Pictures read from files when asked for."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        return read_picture(self.paths[index])


@dataclass(frozen=True)
class Encoded(Sequence):
    """Pictures decoded from a column of `datasets` when asked for."""

    part: Any
    column: str

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.part[index][self.column]
        except Exception as error:  # Pillow's decoders raise almost anything on broken data
            source = self.part.cast_column(self.column, self.part.features[self.column].__class__(decode=False))
            path = source[index][self.column]["path"]
            raise ValueError(f"cannot read image {index} ({path or 'bytes'}): {error}") from error
