"""Labels of a dataset: the columns that contain them, and the conversion to class indices.

                                                      label of one image            batch of labels
    several --label-column
        multi_task                                    {task: class index or -100}   {task: [B] int64}
    a column of lists, or text with --label-separator
        multi_label_classification                    0.0 or 1.0 per class          [B, classes] float32
    any other column
        single_label_classification                   class index                   [B] int64

The label names are declared by the dataset (`ClassLabel`), set by --label-names, or collected as
the sorted distinct values, in this order of precedence. This file also selects the image column.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from ..model.configuration_vitcls import ViTCLSConfig
from ..model.heads_vitcls import IGNORED_LABEL
from .options import DataOptions


IMAGE_COLUMN_NAMES = tuple(
    "image img picture photo pixel_values file_name filename file path jpg png".split()
)
LABEL_COLUMN_NAMES = ("label", "labels", "class", "target", "category", "fine_label", "cls")
NO_LABELS = "no label"  # text for an image without labels in a multi-label dataset

LabelKind = Literal["single_label_classification", "multi_label_classification", "multi_task"]
Features = dict[str, Any]  # type of each column, as in `datasets`
Row = dict[str, Any]  # values by column


@dataclass(frozen=True)
class LabelSpace:
    """Kind of labels, and label names by column. Only a multi-task dataset has several columns."""

    kind: LabelKind
    columns: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        """Return the label names of the only column."""
        (names,) = self.columns.values()
        return names

    @property
    def tasks(self) -> list[str | None]:
        """Return the tasks; None is the only one of a dataset that is not multi-task."""
        return list(self.columns) if self.kind == "multi_task" else [None]

    def get_names(self, task: str | None) -> list[str]:
        """Return the label names of one of `tasks`."""
        return self.names if task is None else self.columns[task]

    @cached_property
    def index_by_name(self) -> dict[str, dict[str, int]]:
        """Return class indices by column and class name."""
        return {
            column: {name: index for index, name in enumerate(names)}
            for column, names in self.columns.items()
        }

    def to_config_values(self) -> dict[str, Any]:
        """Return the fields of ViTCLSConfig that describe the labels."""
        if self.kind == "multi_task":
            return {"tasks": self.columns}
        (label2id,) = self.index_by_name.values()
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": label2id,
            "problem_type": self.kind,
        }

    def collate(self, labels: list[Any]) -> Any:
        """Return the labels of any number of images as tensors, in the format of the kind of labels."""
        if self.kind == "multi_task":
            return {
                task: torch.tensor([label[task] for label in labels], dtype=torch.int64)
                for task in self.columns
            }
        if self.kind == "multi_label_classification":
            return torch.tensor(labels, dtype=torch.float32).reshape(-1, len(self.names))
        return torch.tensor(labels, dtype=torch.int64)

    def format_label(self, label: Any) -> str | None:
        """Return a label as text, or None for an unknown label.

        Examples: "cat", "cat, dog", "age old, kind cat".
        """
        if isinstance(label, dict):
            known_tasks = {
                task: names for task, names in self.columns.items() if is_known(label.get(task))
            }
            return (
                ", ".join(f"{task} {names[label[task]]}" for task, names in known_tasks.items())
                or None
            )
        if isinstance(label, list | tuple):
            return (
                ", ".join(name for name, value in zip(self.names, label, strict=True) if value)
                or NO_LABELS
            )
        return self.names[label] if is_known(label) else None


# label space of datasets that are read without labels
UNLABELED = LabelSpace("single_label_classification", {})


def get_label_space(config: ViTCLSConfig) -> LabelSpace:
    """Return the label space of a classifier."""
    if config.tasks:
        return LabelSpace("multi_task", config.task_labels())
    id2label: dict[Any, str] = dict(config.id2label or {})
    has_several_labels = config.problem_type == "multi_label_classification"
    kind: LabelKind = (
        "multi_label_classification" if has_several_labels else "single_label_classification"
    )
    return LabelSpace(kind, {"label": [id2label[index] for index in range(len(id2label))]})


def is_known(label: int | None) -> bool:
    """Return whether a label is a class index.

    Missing labels are None, -100 (IGNORED_LABEL) or another negative value.
    """
    return label is not None and label >= 0


def is_multi_label(config: ViTCLSConfig) -> bool:
    """Return whether a sigmoid is applied to each logit.

    It is for models with one label, too, as in transformers.
    """
    return not config.tasks and (
        config.problem_type == "multi_label_classification" or config.num_labels == 1
    )


@dataclass(frozen=True, eq=False)
class MultiHotLabels(Sequence):
    """Labels of a multi-label dataset, stored as class indices.

    Items are lists with 0.0 or 1.0 per class.
    """

    indices: np.ndarray  # class indices of all images, in the order of the images
    offsets: np.ndarray  # [N + 1]; the indices of image i start at offsets[i]
    num_classes: int

    @classmethod
    def from_indices(cls, labels: Iterable[Iterable[int]], num_classes: int) -> "MultiHotLabels":
        """Build labels from the class indices of each image; negative indices are ignored."""
        rows = [
            np.unique([index for index in label if index >= 0]).astype(np.int32) for label in labels
        ]
        offsets = np.cumsum([0, *map(len, rows)])
        return cls(np.concatenate([*rows, np.zeros(0, np.int32)]), offsets, num_classes)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        multi_hot = np.zeros(self.num_classes)
        # IndexError at the end, so that it can be iterated
        multi_hot[self.get_indices(range(len(self))[index])] = 1
        return multi_hot.tolist()

    def get_indices(self, index: int) -> np.ndarray:
        """Return the class indices of one image."""
        return self.indices[self.offsets[index] : self.offsets[index + 1]]

    def select(self, indices: Iterable[int]) -> "MultiHotLabels":
        return self.from_indices(map(self.get_indices, indices), self.num_classes)


# Reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelColumn:
    """A label column and the names of its classes."""

    name: str
    classes: list[str]
    # whether the dataset declares the classes, so that labels are indices into `classes`
    is_declared: bool

    def get_index(self, value: Any, row_name: str) -> int:
        """Return the class index of one value, or -100 if the value is missing.

        Raise ValueError if the value is not one of the classes.
        """
        value = normalize_value(value)
        if value is None or (self.is_declared and value == -1):
            return IGNORED_LABEL
        if self.has_class_indices and isinstance(value, int) and 0 <= value < len(self.classes):
            return value
        if str(value) not in self.index_by_name:
            raise ValueError(
                f"{row_name} has the label {value!r}, not one of the {len(self.classes)} classes"
            )
        return self.index_by_name[str(value)]

    def get_indices(self, values: Sequence[Any], name_row: Callable[[int], str]) -> list[int]:
        """Return the class index of each value."""
        known: dict[Any, int] = {}
        for row, value in enumerate(values):
            if value not in known:
                known[value] = self.get_index(value, name_row(row))
        return [known[value] for value in values]

    @cached_property
    def has_class_indices(self) -> bool:
        """Return whether integers are class indices.

        They are if the classes are declared, or if no class name is an integer.
        """
        return self.is_declared or not any(
            name.removeprefix("-").isdecimal() for name in self.classes
        )

    @cached_property
    def index_by_name(self) -> dict[str, int]:
        """Return class indices by class name; empty if the dataset declares the classes."""
        return {} if self.is_declared else {name: index for index, name in enumerate(self.classes)}


@dataclass(frozen=True)
class LabelReader:
    """Reader of the labels in the rows of a dataset."""

    kind: LabelKind
    columns: list[LabelColumn]
    separator: str | None = None

    @property
    def label_space(self) -> LabelSpace:
        return LabelSpace(self.kind, {column.name: column.classes for column in self.columns})

    def read(self, row: Row, row_name: str) -> Any:
        """Return the label of one row in the format of the label kind.

        Raise ValueError if a value is not one of the classes. `row_name` is the name of the row in
        error messages.
        """
        (label,) = self.read_columns(
            [[row[column.name]] for column in self.columns], lambda _: row_name
        )
        return label

    def read_columns(self, values: Sequence[Sequence[Any]], name_row: Callable[[int], str]) -> Any:
        """Return the labels of all rows, a list or `MultiHotLabels` (several labels per image).

        Raise ValueError if a value is not one of the classes.

        Args:
            values: values of each column in `columns`.
            name_row: returns the name of a row in error messages.
        """
        if self.kind == "multi_label_classification":
            (column,) = self.columns
            rows = (
                [
                    column.get_index(label, name_row(row))
                    for label in split_labels(value, self.separator)
                ]
                for row, value in enumerate(values[0])
            )
            return MultiHotLabels.from_indices(rows, len(column.classes))
        indices = [self.columns[n].get_indices(column, name_row) for n, column in enumerate(values)]
        if self.kind == "single_label_classification":
            return indices[0]
        return [
            dict(zip(self.label_space.columns, row, strict=True))
            for row in zip(*indices, strict=True)
        ]


def build_label_reader(
    options: DataOptions, features: Features, read_column: Callable[[str], Iterable[Any]]
) -> LabelReader:
    """Build the label reader of a dataset.

    Raise ValueError if a column does not exist or contains no class labels, or if the classes of a
    column are unknown. `read_column` returns all values of a column.
    """
    names = [
        find_column(
            "label",
            name,
            features,
            has_matching_type=find_class_label,
            common_names=LABEL_COLUMN_NAMES,
            dataset=options.dataset,
        )
        for name in options.label_column or (None,)
    ]
    has_lists = bool(options.label_separator) or any(
        get_item_type(features[name]) is not None for name in names
    )
    if has_lists and len(names) > 1:
        raise ValueError(
            f"{options.dataset}: several label columns require one label per image. Set one "
            "`label_column`, or omit `label_separator`"
        )
    kind: LabelKind = "multi_label_classification" if has_lists else "single_label_classification"
    columns = [build_label_column(options, name, features[name], read_column) for name in names]
    return LabelReader("multi_task" if len(names) > 1 else kind, columns, options.label_separator)


def build_label_column(
    options: DataOptions, name: str, feature: Any, read_column: Callable[[str], Iterable[Any]]
) -> LabelColumn:
    """Build one label column.

    The class names are declared, set by `label_names`, or collected from the values.
    """
    class_label = find_class_label(feature)
    if class_label is not None:
        if options.label_names not in (None, tuple(class_label.names)):
            raise ValueError(
                f"`label_names` has no effect on {options.dataset}, which has the labels "
                f"{', '.join(map(repr, class_label.names[:20]))}. Remove `label_names`"
            )
        return LabelColumn(name, list(class_label.names), is_declared=True)
    if options.label_names is not None:
        return LabelColumn(name, list(options.label_names), is_declared=False)

    distinct_values: set[Any] = set()
    for value in read_column(name):
        for label in map(normalize_value, split_labels(value, options.label_separator)):
            if isinstance(label, float) or not isinstance(label, Hashable):
                raise ValueError(
                    f"{options.dataset}: the column {name!r} has no class labels. Set "
                    "`label_column`"
                )
            distinct_values.add(label)

    distinct_values.discard(None)
    classes = [
        str(value)
        for value in sorted(distinct_values, key=lambda value: (isinstance(value, str), value))
    ]
    return LabelColumn(name, classes, is_declared=False)


def describe_similar_labels(label_space: LabelSpace) -> list[str]:
    """Return a warning for each column with labels that differ only in case or white space."""
    warnings = []
    for column, names in label_space.columns.items():
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(" ".join(name.split()).casefold(), []).append(name)
        similar = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
        if similar:
            warnings.append(
                f"labels of {column!r} differ only in case or white space and are separate "
                f"classes: {', '.join(similar[:10])}. Give them one name"
            )
    return warnings


def split_labels(value: Any, separator: str | None) -> list[Any]:
    """Return the labels in one value.

    They are the items of a list, the text between separators, or the value itself.
    """
    if isinstance(value, list):
        return value
    if separator is None or not isinstance(value, str):
        return [value]
    return [label.strip() for label in value.split(separator)]  # empty text is a missing label


def normalize_value(value: Any) -> Any:
    """Return a label as text or as an integer, or None for a missing label.

    Whole floats become integers, because the integers in a column with missing values are read as
    floats.
    """
    if value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Columns ------------------------------------------------------------------------------------------


def find_image_column(options: DataOptions, features: Features) -> str:
    """Return the name of the column of images or image paths."""
    return find_column(
        "image",
        options.image_column,
        features,
        has_matching_type=is_image_feature,
        common_names=IMAGE_COLUMN_NAMES,
        dataset=options.dataset,
    )


def find_column(
    kind: str,
    name: str | None,
    features: Features,
    has_matching_type: Callable[[Any], Any],
    common_names: tuple[str, ...],
    dataset: str,
) -> str:
    """Return the name of the column of a kind.

    It is the requested column, the only column of the matching type, or the first column with a
    common name.
    """
    if name is not None and name not in features:
        raise ValueError(f"{dataset} has no column {name!r}. Choose one of {', '.join(features)}")
    if name is not None:
        return name

    matching_columns = [
        column for column, feature in features.items() if has_matching_type(feature)
    ]
    if len(matching_columns) == 1:
        return matching_columns[0]
    for column in common_names:
        if column in (matching_columns or features):
            return column

    raise ValueError(
        f"{dataset}: cannot identify the {kind} column among {', '.join(features)}. Set "
        f"`{kind}_column`"
    )


def is_image_feature(feature: Any) -> bool:
    """Return whether a column with the type `feature` contains images and not paths."""
    is_encoded = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    return (
        type(feature).__name__ == "Image"
        or is_encoded
        or getattr(feature, "dtype", None) == "binary"
    )


def find_class_label(feature: Any) -> Any:
    """Return the `ClassLabel` of a column of labels or lists of labels; None for other columns."""
    column_types = (feature, get_item_type(feature))
    return next(
        (column_type for column_type in column_types if type(column_type).__name__ == "ClassLabel"),
        None,
    )


def get_item_type(feature: Any) -> Any:
    """Return the item type of a list column, or None for any other column."""
    if isinstance(feature, list):
        return feature[0]
    return feature.feature if type(feature).__name__ in ("List", "LargeList", "Sequence") else None
