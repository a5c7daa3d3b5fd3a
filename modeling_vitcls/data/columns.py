"""Image and label columns of a dataset, and the conversion of column values to labels.

    several --label-column                             -> multi-task: a class index per task, -100 if it is missing
    a column of lists, or text with --label-separator  -> multi-label: 0.0 or 1.0 per class
    any other column                                   -> single-label: a class index

The label names are declared by the dataset (`ClassLabel`), set by --label-names, or the sorted distinct values, in
this order of precedence.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..heads_vitcls import IGNORED_LABEL
from ..options import DataOptions
from .labels import LabelKind, LabelSpace


IMAGE_NAMES = ("image", "img", "picture", "photo", "pixel_values", "file_name", "filename", "file", "path")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "fine_label")

Features = dict[str, Any]  # the type of each column, in the terms of `datasets`
Row = dict[str, Any]  # values by column


@dataclass(frozen=True)
class LabelColumn:
    """One column of labels, and the names of its classes."""

    column: str
    names: list[str]
    is_declared: bool  # whether the values of the column are indices into `names`

    def index_of(self, value: Any, where: str) -> int:
        """Return the class index of one value; -100 for a missing value.

        Raises:
            ValueError: if the value is not one of the classes.
        """
        value = plain_value(value)
        if value is None or (self.is_declared and value == -1):
            return IGNORED_LABEL
        index = value if self.is_place(value) else self.index_by_name.get(str(value))
        if index is None:
            raise ValueError(f"{where} has the label {value!r}, which is none of the {len(self.names)} classes")
        return index

    def is_place(self, value: Any) -> bool:
        """Return whether a value is an index into `names` instead of a name."""
        return self.counts_places and isinstance(value, int) and 0 <= value < len(self.names)

    @cached_property
    def counts_places(self) -> bool:
        """Whether integers are indices into `names`: if the column is declared, or no name is an integer."""
        return self.is_declared or not any(name.removeprefix("-").isdecimal() for name in self.names)

    @cached_property
    def index_by_name(self) -> dict[str, int]:
        """Class indices by name."""
        return {} if self.is_declared else {name: index for index, name in enumerate(self.names)}


@dataclass(frozen=True)
class LabelReader:
    """Converts rows of a dataset to labels."""

    kind: LabelKind
    columns: list[LabelColumn]
    separator: str | None = None

    @property
    def space(self) -> LabelSpace:
        """The kind of labels and their names."""
        return LabelSpace(self.kind, {column.column: column.names for column in self.columns})

    def read(self, row: Row, where: str) -> Any:
        """Return the label of one row, in the format of labels.py.

        Args:
            row: the values of the label columns; other columns are ignored.
            where: name of the row in error messages.

        Raises:
            ValueError: if a value is not one of the classes, or a single label is missing.
        """
        if self.kind == "multi_task":
            return {column.column: column.index_of(row[column.column], where) for column in self.columns}
        (column,) = self.columns
        value = row[column.column]
        if self.kind == "multi_label_classification":
            return several_hot([column.index_of(part, where) for part in parts(value, self.separator, where)], column)
        index = column.index_of(value, where)
        if index == IGNORED_LABEL:
            raise ValueError(f"{where} has the label {value!r}, which is none of the {len(column.names)} classes")
        return index


# The labels of data sets without labels.
UNLABELLED = LabelSpace("single_label_classification", {})


def build_label_reader(
    options: DataOptions, features: Features, distinct: Callable[[str], Iterable[Any]] | None
) -> LabelReader:
    """Build the label reader of a dataset.

    Args:
        options: the data options.
        features: the columns of the dataset.
        distinct: function that returns all values of a column, for columns that do not declare their classes; None if
            not all values can be read.

    Raises:
        ValueError: if a column does not exist, contains no class labels, or has unknown classes.
    """
    asked = options.label_column or (find_column("label", None, features, is_label, LABEL_NAMES, options.dataset),)
    for column in asked:
        find_column("label", column, features, is_label, LABEL_NAMES, options.dataset)
    holds_several = [column for column in asked if item_of(features[column]) is not None or options.label_separator]
    if holds_several and len(asked) > 1:
        raise ValueError(
            f"{options.dataset}: with several label columns each image has one label in each of them, and "
            f"{holds_several[0]!r} holds several: give one --label-column and no --label-separator, or other columns"
        )
    kind: LabelKind = "single_label_classification"
    if len(asked) > 1:
        kind = "multi_task"
    elif holds_several:
        kind = "multi_label_classification"
    columns = [build_label_column(options, column, features[column], distinct) for column in asked]
    return LabelReader(kind, columns, options.label_separator)


def build_label_column(
    options: DataOptions, column: str, feature: Any, distinct: Callable[[str], Iterable[Any]] | None
) -> LabelColumn:
    """Build one label column. Its class names are declared, set by --label-names, or the distinct values."""
    declared = next((kind for kind in (feature, item_of(feature)) if type(kind).__name__ == "ClassLabel"), None)
    if declared is not None:
        return LabelColumn(column, list(declared.names), is_declared=True)
    if options.label_names is not None:
        if options.label_column is not None and len(options.label_column) > 1:
            raise ValueError(f"--label-names are for one label column, and {column!r} is one of several")
        return LabelColumn(column, list(options.label_names), is_declared=False)
    if distinct is None:
        raise ValueError(f"{options.dataset} does not declare the labels of {column!r}: name all with --label-names")
    found = {
        plain_value(part)
        for value in distinct(column)
        for part in parts(value, options.label_separator, f"{options.dataset}, column {column!r}: a row")
    } - {None}
    if any(isinstance(value, float | dict) for value in found):
        raise ValueError(
            f"{options.dataset}: the column {column!r} holds no class labels: name the right one with --label-column"
        )
    names = [str(value) for value in sorted(found, key=lambda value: (isinstance(value, str), value))]
    return LabelColumn(column, names, is_declared=False)


def find_column(
    kind: str,
    asked: str | None,
    columns: Features,
    matches: Callable[[Any], bool],
    usual_names: tuple[str, ...],
    dataset: str,
) -> str:
    """Return the requested column, the only column of the matching type, or the first column with a usual name."""
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


def find_image_column(options: DataOptions, features: Features) -> str:
    """Return the name of the column of images or image paths."""
    return find_column("image", options.image_column, features, is_image, IMAGE_NAMES, options.dataset)


def is_image(feature: Any) -> bool:
    """Return whether a column contains images instead of paths."""
    is_encoded = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    return type(feature).__name__ == "Image" or is_encoded or getattr(feature, "dtype", None) == "binary"


def is_label(feature: Any) -> bool:
    """Return whether a column is declared as class labels."""
    return any(type(kind).__name__ == "ClassLabel" for kind in (feature, item_of(feature)))


def item_of(feature: Any) -> Any:
    """Return the item type of a list column; None for other columns."""
    if isinstance(feature, list):
        return feature[0]
    return feature.feature if type(feature).__name__ in ("List", "LargeList", "Sequence") else None


def parts(value: Any, separator: str | None, where: str) -> list[Any]:
    """Return the labels in one value: the items of a list, the text between separators, or the value itself."""
    if isinstance(value, list):
        return value
    if separator is None:
        return [value]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} has the label {value!r}: --label-separator is for columns of text")
    return [part.strip() for part in (value or "").split(separator) if part.strip()]


def plain_value(value: Any) -> Any:
    """Return a label as text or integer, None if missing. Files with missing values store integers as floats."""
    if value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def several_hot(indices: list[int], column: LabelColumn) -> list[float]:
    """Return a multi-hot list: 1.0 for the given class indices and 0.0 for the other classes."""
    present = set(indices)
    return [float(index in present) for index in range(len(column.names))]
