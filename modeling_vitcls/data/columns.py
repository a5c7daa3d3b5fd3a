"""Columns of a table: its images and labels, its own splits, and groups of images.

image      images or image paths (--image-column)
label      labels; 0 and 1 in one column for each class are several labels, other columns are tasks (--label-column)
split      train, validation or test of each row, in any usual spelling (--split-column); else its first folder
patient    rows of one group are on one side of every split (--group-column)
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np

from ..model.image_processing_vitcls import shorten_text
from ..runtime.errors import format_name_list, warn_on_first_process
from ..runtime.files import find_similar_names
from .cells import (
    BITS,
    LabelColumn,
    find_separator,
    get_bit,
    parse_text,
    read_label_names,
    spell_label,
)
from .folder_layout import FOLDER_COLUMN, SPLIT_BY_CELL, SPLIT_BY_FOLDER_NAME, SPLIT_ORDER
from .images import DatasetImages, resolve_path
from .labels import LabelSpace, OneLabel, PerTask, SeveralLabels


IMAGE_COLUMN_NAMES = tuple(
    "image img picture photo pixel_values file_name filename file path jpg png".split()
)
LABEL_COLUMN_NAMES = ("label", "labels", "class", "target", "category", "fine_label", "cls")
FILE_NAME = "file_name"  # The column of images in metadata.csv
SPLIT_COLUMN_NAMES = ("split", "subset", "partition", "set", "data_split")
BINARY_TYPES = ("binary", "large_binary", "binary_view")  # The last ones are of pandas and polars
PIXEL_COLUMN = re.compile(r"(pixels?|px)[ _-]?\d*(x\d+)?", re.IGNORECASE)  # pixel0, ..., pixel783
MIN_ROWS = 10  # In fewer rows, one label in each may be an accident
MAX_CHECKED_COLUMNS = 50  # The first ones; reading all of a wide table takes minutes
MAX_NAMED_COLUMNS = 20  # In an error about all columns of a table
MAX_CHECKED_PATHS = 100  # First paths of a table, of which one must be a file

Features = dict[str, Any]  # Type of each column, as in `datasets`


# Images and labels --------------------------------------------------------------------------------


def find_image_column(
    dataset: str,
    table: Any,
    folder: Path,
    column: str | None,
    label_columns: Sequence[str] | None = None,
) -> str:
    """Find the column of images or image paths; a label column is not meant.

    Paths are relative to `folder`. Raise ValueError without such a column, or without rows.
    """
    if not len(table):
        raise ValueError(f"{dataset} is empty. Add rows with images")
    if column is not None:
        check_column(table, column, dataset)
        return column
    excluded = label_columns or [
        name for name in table.features if name.lower() in LABEL_COLUMN_NAMES
    ]
    candidates = {name: each for name, each in table.features.items() if name not in excluded}
    if len(candidates) == 1 < len(table.features):
        return next(iter(candidates))
    return find_column(
        "image",
        candidates,
        is_image_feature,
        IMAGE_COLUMN_NAMES,
        dataset,
        lambda name: has_files(map(spell_label, table[:MAX_CHECKED_PATHS][name]), folder),
    )


def find_stem(features: Features, column: str) -> str | None:
    """Find the column itself or, for a field such as `label.name`, the column of its objects."""
    return max(
        (name for name in features if column == name or column.startswith(f"{name}.")),
        key=len,
        default=None,
    )


def check_column(table: Any, column: str, dataset: str) -> None:
    """Raise ValueError if a table has no such column."""
    if find_stem(table.features, column) is None:
        raise ValueError(
            f"{dataset} has no column {column!r}. Choose one of {', '.join(table.features)}"
        )


def has_files(paths: Iterable[str | None], folder: Path) -> bool:
    """Tell whether one of the paths, which are relative to a folder, is a file or a data URI."""
    found = (resolve_path(folder, path) for path in paths if path)
    return any(path.startswith("data:") or os.path.isfile(path) for path in found)  # noqa: PTH113  # False for long names


def find_label_columns(
    dataset: str, tables: Mapping[str, Any], columns: Sequence[str] | None, image_column: str
) -> list[str]:
    """Find the label columns, which the first split must have; fields of objects may be such columns."""
    first = next(iter(tables.values()))
    if not columns and not has_label_column(first.features, ()):
        check_are_no_bits(first, image_column, dataset)
    # A column that is named twice counts once
    found = list(dict.fromkeys(columns or ())) or [
        find_column(
            "label",
            {**first.features, **list_fields(first.features)},
            get_declared_names,
            LABEL_COLUMN_NAMES,
            dataset,
            lambda each: each in first.features and each not in (image_column, *SPLIT_COLUMN_NAMES),
        )
    ]
    split = next(iter(tables))
    for column in found:
        check_column(first, column, f"{dataset}, split {split!r}")
    return found


def check_are_no_bits(table: Any, image_column: str, dataset: str) -> None:
    """Raise ValueError if a table has a column of 0 and 1 for each class, which no one has named."""
    others = {name: each for name, each in table.features.items() if name != image_column}
    names = [name for name, each in others.items() if not is_image_feature(each)]
    names = names[:MAX_CHECKED_COLUMNS]
    cells = {name: {spell_label(cell) for cell in read_column(table, name)} for name in names}
    bits = [name for name in names if {get_bit(cell) for cell in cells[name]} == {False, True}]
    if len(bits) > 1:
        raise ValueError(
            f"{dataset}: the columns {format_name_list(bits, MAX_NAMED_COLUMNS)} have 0 and 1 only. If each is a "
            "class, set `label_column` to all of them"
        )


def drop_unlabeled_splits(
    dataset: str, tables: Mapping[str, Any], columns: Sequence[str]
) -> dict[str, Any]:
    """Leave out splits that have no label column and no other new one, such as test.csv of a competition.

    Raise ValueError if a split has columns of its own: one of them may have the labels.
    """
    first, *others = tables
    unlabeled = [
        split
        for split in others
        if not any(find_stem(tables[split].features, column) for column in columns)
        and tables[split].features.keys() <= tables[first].features.keys()
    ]
    if unlabeled:
        warn_on_first_process(
            f"{dataset}: splits without labels (no column {format_name_list(columns)}) are left out: "
            f"{format_name_list(unlabeled)}"
        )
    labeled = {split: table for split, table in tables.items() if split not in unlabeled}
    for split, table in labeled.items():
        for column in columns:
            check_column(table, column, f"{dataset}, split {split!r}")
    return labeled


def has_label_column(features: Features, names: Collection[str]) -> bool:
    """Tell whether a column is a label by its type or name, or is one of the given names."""
    return any(find_stem(features, name) is not None for name in names) or any(
        get_declared_names(feature) or name.lower() in LABEL_COLUMN_NAMES
        for name, feature in features.items()
    )


def find_column(
    kind: str,
    features: Features,
    has_matching_type: Callable[[Any], Any],
    common_names: tuple[str, ...],
    dataset: str,
    is_possible: Callable[[str], bool],
) -> str:
    """Find the column of a kind.

    It is the only column of the matching type, the first column with a common name, or the only
    possible one.
    """
    matching_columns = [
        column for column, feature in features.items() if has_matching_type(feature)
    ]
    if len(matching_columns) == 1:
        return matching_columns[0]
    # By the last part of a field such as `json.label`. Sorted: names without a dot come first
    names = sorted(matching_columns or features, key=lambda name: "." not in name)
    column_by_name = {name.lower().rpartition(".")[2]: name for name in names}
    for common_name in common_names:
        if common_name in column_by_name:
            return column_by_name[common_name]
    possible = list(filter(is_possible, features))
    if len(possible) == 1:
        return possible[0]

    if kind == "label" and not possible:
        raise ValueError(
            f"{dataset} has no labels: its columns are {', '.join(features)}. Add a column label, or predict the "
            "labels with `predict`"
        )
    numbered = [name for name in features if PIXEL_COLUMN.fullmatch(name)]
    if kind == "image" and numbered:
        raise ValueError(
            f"{dataset}: the columns {format_name_list(numbered)} look like the pixels of images. Load them in "
            "Python, as arrays [height, width]: `finetune(model, list(zip(images, labels)), folder)`"
        )
    remedy = (
        "or write a table whose first line is the header, and whose columns are separated by commas, semicolons, "
        "tabs or bars"
    )
    if fields := [name for name in list_fields(features) if name not in features]:
        remedy = f"also to a field of an object ({format_name_list(fields)})"
    raise ValueError(
        f"{dataset}: cannot identify the {kind} column among {format_name_list(list(features), MAX_NAMED_COLUMNS)}. "
        f"Set `{kind}_column`, {remedy}"
    )


def list_fields(features: Features) -> Features:
    """List the fields of columns of objects, by names such as `json.label`."""
    return {
        f"{column}.{name}": each
        for column, feature in features.items()
        if isinstance(feature, dict) and not is_image_feature(feature)
        for name, each in feature.items()
    }


def is_image_feature(feature: Any) -> bool:
    """Tell whether a column of the type `feature` contains images and not paths."""
    is_encoded = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    return (
        type(feature).__name__ == "Image"
        or is_encoded
        or getattr(feature, "dtype", None) in BINARY_TYPES
    )


def get_declared_names(feature: Any) -> tuple[str, ...]:
    """Read the names of the `ClassLabel` of a column of labels or lists of labels; () without one."""
    item = getattr(feature, "feature", feature)  # The items of a list have a type of their own
    return tuple(item.names) if type(item).__name__ == "ClassLabel" else ()


def read_labels(
    tables: Mapping[str, Any],
    columns: Sequence[str],
    dataset: str,
    separator: str | None = None,
    label_names: Sequence[str] | None = None,
) -> tuple[LabelSpace, dict[str, Any]]:
    """Read the label columns of all splits: cells become label names, and names become indices.

    Args:
        tables: `datasets.Dataset` of each split.
        columns: label columns. Several columns of 0 and 1 are classes, other ones are tasks, which
            are sorted by name.
        dataset: name of the dataset in error messages.
        separator: separator of several labels in one text.
        label_names: names of all classes, if the dataset does not declare them.

    Returns:
        The label space, and the labels of each split in the format of its kind.

    Raises:
        ValueError: if a column contains no class labels, or a row has a label that is not a class.
    """
    cells = {
        column: {split: read_column(table, column) for split, table in tables.items()}
        for column in columns
    }
    is_task = len(columns) > 1
    build: type[LabelSpace] = PerTask if is_task else OneLabel
    marks = chain(*(chain(*parts.values()) for parts in cells.values())) if is_task else ()
    bits: dict[str | None, bool | None] = {
        text: get_bit(text) for text in map(spell_label, marks) if text is not None
    }
    if len(bits) == 1:  # People mark what an image has with a 1, or with an x
        bits = {text: bit is not False for text, bit in bits.items()}
    if is_task and None not in bits.values():
        build = SeveralLabels
        classes = {"labels": list(columns)}
        # Beside marks, an empty cell is no missing label.
        bits[None] = None if False in bits.values() else False
        names = {"labels": {split: name_columns(cells, split, bits) for split in tables}}
        warn_about_one_hot(dataset, columns, list(chain(*names["labels"].values())))
    else:
        classes, names = {}, {}
        for column, parts in cells.items():
            declared = {
                split: get_declared_names(table.features.get(column))
                for split, table in tables.items()
            }
            is_folder = all(FOLDER_COLUMN in table.features for table in tables.values())
            label_column = LabelColumn(dataset, column, parts, is_folder)
            if separator is None and not is_task:
                separator = find_separator(label_column, label_names)
            classes[column], names[column], has_lists = read_label_names(
                label_column, declared, separator, label_names
            )
            if has_lists and is_task:
                raise ValueError(
                    f"{label_column.where} has lists, but several label columns require one label per image. "
                    "Set one `label_column`, or omit `label_separator`"
                )
            if has_lists:
                build = SeveralLabels

    if build is PerTask:
        if odd := [column for column in columns if not column.isidentifier()]:
            raise ValueError(
                f"{dataset}: the name of a task has letters, digits and _ only, so {odd[0]!r} cannot be "
                "one. Rename this column"
            )
        classes = dict(sorted(classes.items()))  # like the classifiers of a model
    # One label space for all splits, so an index is the same class in each of them.
    space = build(classes, separator)
    labels = {}
    for split in tables:
        rows = {column: parts[split] for column, parts in names.items()}
        labels[split] = space.index(rows, f"{dataset}, split {split!r}")
    return space, labels


def warn_about_one_hot(
    dataset: str, columns: Sequence[str], labels: Sequence[list[str] | None]
) -> None:
    """Log a warning if each row has exactly one label, although its columns allow several."""
    if len(labels) >= MIN_ROWS and all(each is not None and len(each) == 1 for each in labels):
        warn_on_first_process(
            f"WARNING: {dataset}: each row has a 1 in exactly one of the columns {format_name_list(columns)}. If an "
            "image can have one of these labels only, write its name into one column, such as label"
        )


def name_columns(
    cells: Mapping[str, Mapping[str, list[Any]]], split: str, bits: Mapping[str | None, bool | None]
) -> list[list[str] | None]:
    """Name, for each row of a split, the columns whose text means true.

    `bits` are the meanings of the texts, and of an empty cell (None). If one is None, the labels of
    the row are missing.
    """
    names: list[list[str] | None] = []
    for row in zip(*(parts[split] for parts in cells.values()), strict=True):
        values = [bits[spell_label(cell)] for cell in row]
        names.append(None if None in values else list(compress(cells, values)))
    return names


def read_column(table: Any, column: str) -> list[Any]:
    """Read all values of one column, or of a field such as `label.name` of its objects."""
    stem = find_stem(table.features, column)
    values: list[Any] = table.select_columns([stem])[:][stem]
    if column == stem:
        return values
    name = column.removeprefix(f"{stem}.")
    return [read_field(parse_text(value), name) for value in values]


def read_field(value: Any, name: str) -> Any:
    """Read a field of an object, or of each object of a list: one value if there is a single object."""
    if isinstance(value, list):
        found = [read_field(each, name) for each in value]
        return found[0] if len(found) == 1 else found
    return value.get(name) if isinstance(value, dict) else None


# Splits and groups --------------------------------------------------------------------------------


def divide_by_column(
    splits: Any, dataset: str, column: str | None, label_columns: Collection[str]
) -> tuple[Any, dict[str, str]]:
    """Divide the only split of a table by its column of splits, or by the first folders of its files.

    Returns:
        The splits by name, and the fact about the column or the folders, if there are any.

    Raises:
        ValueError: if the column does not exist or contains other values, or if it was named and
            the dataset has several splits.
    """
    if len(splits) > 1:
        if column is not None:
            raise ValueError(
                f"`split_column` has no effect on {dataset}, which has the splits "
                f"{', '.join(splits)}. Remove `split_column`"
            )
        return splits, {}
    (table,) = splits.values()
    is_named = column is not None
    if column is None:
        column = next((name for name in table.features if name.lower() in SPLIT_COLUMN_NAMES), None)
    if column is None or column in label_columns:
        files = read_texts(splits, FILE_NAME, dataset) if FILE_NAME in table.features else []
        folders = [re.split(r"[/\\]", name or "")[0].lower() for name in files]
        parts = [SPLIT_BY_FOLDER_NAME.get(folder, "") for folder in folders]
        if "" in parts or len({*parts}) < 2:
            return splits, {}
        return select_parts(table, parts, f"the folders in {FILE_NAME!r}")

    split_by_cell = SPLIT_BY_CELL
    if marked := re.search("train|val|test", column.lower()):  # Of 0 and 1, such as is_train
        rest = "test" if marked.group() == "train" else "train"
        split_by_cell = split_by_cell | {
            text: SPLIT_BY_CELL[marked.group()] if bit else rest for text, bit in BITS.items()
        }
    texts = read_texts(splits, column, dataset)
    names = [re.sub("[ _-]", "", name or "").lower() for name in texts]
    unknown = set(names) - split_by_cell.keys()
    if unknown:
        values = format_name_list(sorted(map(repr, unknown)))
        if not is_named and unknown == set(names):
            return splits, {"splits": f"the column {column!r} is not used: it contains {values}"}
        raise ValueError(
            f"{dataset}: the column {column!r} contains {values}. Its values must be train, "
            "validation or test; rename or remove the column if it means something else, or set "
            f"`group_column={column!r}` if these are folds"
        )
    parts = [split_by_cell[name] for name in names]
    return select_parts(table, parts, f"column {column!r}")


def select_parts(table: Any, parts: Sequence[str], source: str) -> tuple[Any, dict[str, str]]:
    """Select the rows of each split, and describe them. `parts` has the split of each row."""
    names = np.array(parts)
    divided = {
        split: table.select(np.flatnonzero(names == split))
        for split in SPLIT_ORDER
        if split in parts
    }
    counts = ", ".join(f"{split} {len(part):,}" for split, part in divided.items())
    return divided, {"splits": f"{source}: {counts} rows"}


def read_texts(tables: Mapping[Any, Any], column: str, dataset: str) -> list[str | None]:
    """Read a column of all splits as text; None for an empty cell. Raise ValueError without it."""
    texts: list[str | None] = []
    for table in tables.values():
        check_column(table, column, dataset)
        texts += map(spell_label, read_column(table, column))
    return texts


def build_images(dataset: Any, column: str, folder: Path, name: str) -> DatasetImages:
    """Build the images of one split.

    The column contains encoded images, or paths relative to `folder`. Raise ValueError if none of
    the paths is a file.
    """
    import datasets

    if column not in dataset.features:  # A field of objects
        texts = list(map(spell_label, read_column(dataset, column)))
        dataset = datasets.Dataset.from_dict(
            {column: texts}, datasets.Features({column: datasets.Value("string")})
        )
    images = dataset.select_columns([column])
    feature = dataset.features[column]
    if mode := getattr(feature, "mode", None):
        raise ValueError(
            f"{name}: the column {column!r} has the mode {mode!r}, which would be ignored. Pass "
            f"dataset.cast_column({column!r}, datasets.Image()), or convert the images themselves"
        )
    is_encoded = is_image_feature(feature)
    if getattr(feature, "dtype", None) in BINARY_TYPES:
        images = images.cast_column(column, datasets.Value("binary"))
    if is_encoded:
        images = images.cast_column(column, datasets.Image(decode=False))
    elif type(feature).__name__ != "Value":
        raise ValueError(
            f"{name}: the column {column!r} has lists or objects ({feature}). Write one image or file name "
            "into each row, or set `image_column`"
        )
    elif feature.dtype not in ("string", "large_string"):
        images = images.cast_column(column, datasets.Value("string"))  # Numbers as file names

    paths = [] if is_encoded else [path for path in images[:MAX_CHECKED_PATHS][column] if path]
    is_missing = bool(paths) and not has_files(paths, folder)
    if is_missing and has_files(paths, Path()):
        folder = Path()  # `predict` names photos from the working folder
    elif is_missing:
        if similar := find_similar_names(folder / paths[0]):
            raise ValueError(
                f"{name}: there is no file {shorten_text(paths[0])}, but {similar[0]}. Rename the files, or "
                f"write their names in {column!r} as they are, with the same upper and lower case"
            )
        raise ValueError(
            f"{name}: the column {column!r} has no names of files in {folder}, such as "
            f"{shorten_text(paths[0])}. Set `image_column` to a column of file names, write them with "
            "their folder and suffix (without `file:` and %20), or download addresses with `img2dataset`"
        )
    return DatasetImages(images, folder, np.arange(len(images)))
