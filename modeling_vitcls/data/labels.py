"""Labels of a dataset: the columns that contain them, and the conversion to class indices.

                                                      label of one image            batch of labels
    several --label-column
        multi_task                                    {task: class index or -100}   {task: [B] int64}
    a column of lists or of vectors of 0 and 1, text with --label-separator, or one --label-column of 0 and 1 per class
        multi_label_classification                    0.0 or 1.0 per class          [B, classes] float32
    any other column
        single_label_classification                   class index                   [B] int64

The label names are declared by the dataset (`ClassLabel`), set by --label-names, or collected as
the sorted distinct values, in this order of precedence. Each split may declare them in an order of
its own: labels are matched by name. This file also selects the image column.
"""

import ast
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import torch

from ..model.configuration_vitcls import ViTCLSConfig
from ..model.heads_vitcls import IGNORED_LABEL
from ..runtime.errors import warn_on_first_process
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
        """Return class indices by column and class name in the Unicode form NFC."""
        return {
            column: {unicodedata.normalize("NFC", name): index for index, name in enumerate(names)}
            for column, names in self.columns.items()
        }

    def to_config_values(self) -> dict[str, Any]:
        """Return the fields of ViTCLSConfig that describe the labels."""
        if self.kind == "multi_task":
            return {"tasks": self.columns}
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
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

    indices: list[list[int]]  # class indices of each image
    num_classes: int

    @classmethod
    def from_indices(cls, labels: Iterable[Iterable[int]], num_classes: int) -> "MultiHotLabels":
        """Build labels from the class indices of each image; negative indices are ignored."""
        rows = [sorted({int(index) for index in label if index >= 0}) for label in labels]
        return cls(rows, num_classes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        multi_hot = [0.0] * self.num_classes
        for label in self.indices[index]:
            multi_hot[label] = 1.0
        return multi_hot

    def select(self, indices: Iterable[int]) -> "MultiHotLabels":
        return replace(self, indices=[self.indices[index] for index in indices])


# Reading ------------------------------------------------------------------------------------------


# how a row contains its labels: one value per column, a list of labels, one place per class with 0
# or 1, or one such column per class
LabelForm = Literal["value", "list", "vector", "class columns"]
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
BITS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


@dataclass(frozen=True)
class LabelColumn:
    """A label column and the names of its classes."""

    name: str
    classes: list[str]
    # names that the split declares, so that labels are indices into these; None: labels are names
    declared: tuple[str, ...] | None = None

    @cached_property
    def index_by_name(self) -> dict[str, int]:
        """Class index by name and, if no name is a number, by the class index as text."""
        indices = range(len(self.classes))
        by_name = dict(zip(self.classes, indices, strict=True))
        if any(name.removeprefix("-").isdecimal() for name in self.classes):
            return by_name
        return dict(zip(map(str, indices), indices, strict=True)) | by_name

    def get_index(self, value: Any, row_name: str) -> int:
        """Return the class index of one value, or -100 if the value is missing.

        Raise ValueError if the value is not one of the classes.
        """
        is_index = self.declared is not None and type(value) is int
        label = dict(enumerate(self.declared or ())).get(value) if is_index else value
        name = get_class_name(label)
        if name is None and (value == -1 or not is_index):
            return IGNORED_LABEL
        if name not in self.index_by_name:
            raise ValueError(
                f"{row_name} has the label {value!r}, not one of the {len(self.classes)} classes"
            )
        return self.index_by_name[name]

    def get_indices(self, values: Sequence[Any], name_row: Callable[[int], str]) -> list[int]:
        """Return the class index of each value."""
        known: dict[str, int] = {}
        for row, value in enumerate(values):
            if str(value) not in known:
                known[str(value)] = self.get_index(value, name_row(row))
        return [known[str(value)] for value in values]


@dataclass(frozen=True)
class LabelReader:
    """Reader of the labels in the rows of one split."""

    kind: LabelKind
    form: LabelForm
    column_names: list[str]  # columns of the table
    columns: list[LabelColumn]  # the same, or a single one for the columns of classes
    separator: str | None = None

    @property
    def label_space(self) -> LabelSpace:
        return LabelSpace(self.kind, {column.name: column.classes for column in self.columns})

    def for_split(self, features: Features) -> "LabelReader":
        """Return the reader of a split with these columns, whose class indices are its own."""
        columns = [
            replace(column, declared=get_declared_names(features.get(column.name)))
            for column in self.columns
        ]
        return replace(self, columns=columns)

    def read(self, row: Row, row_name: str) -> Any:
        """Return the label of one row in the format of the label kind.

        Raise ValueError if a value is not one of the classes. `row_name` is the name of the row in
        error messages.
        """
        values = [[row[name]] for name in self.column_names]
        return self.read_columns(values, lambda _: row_name)[0]

    def read_columns(self, values: Sequence[Sequence[Any]], name_row: Callable[[int], str]) -> Any:
        """Return the labels of all rows, a list or `MultiHotLabels` (several labels per image).

        Raise ValueError if a value is not one of the classes.

        Args:
            values: values of each column in `columns`.
            name_row: returns the name of a row in error messages.
        """
        if self.kind == "multi_label_classification":
            rows = (
                self.read_list(list(row), name_row(number))
                for number, row in enumerate(zip(*values, strict=True))
            )
            return MultiHotLabels.from_indices(rows, len(self.label_space.names))
        indices = [self.columns[n].get_indices(column, name_row) for n, column in enumerate(values)]
        if self.kind == "single_label_classification":
            return indices[0]
        return [
            dict(zip(self.label_space.columns, row, strict=True))
            for row in zip(*indices, strict=True)
        ]

    def read_list(self, values: list[Any], row_name: str) -> list[int]:
        """Return the class indices of an image with several labels, given its value per column."""
        if self.form == "list":
            labels = split_labels(values[0], self.separator)
            return [self.columns[0].get_index(label, row_name) for label in labels]
        names = self.label_space.names
        bits = values if self.form == "class columns" else split_labels(values[0], None)
        if bits in ([None], [""]):
            return []
        if len(bits) != len(names) or not all(map(is_bit, bits)):
            raise ValueError(
                f"{row_name} has the labels {values!r}, not 0 or 1 for each of the {len(names)} "
                "classes"
            )
        return [index for index, bit in enumerate(bits) if BITS.get(str(bit).lower())]


def build_label_reader(
    options: DataOptions,
    features_by_split: Mapping[str, Features],
    read_column: Callable[[str], Iterable[Any]],
) -> LabelReader:
    """Build the label reader of a dataset; `for_split` returns that of a split.

    Raise ValueError if a column does not exist or contains no class labels, or if the classes of a
    column are unknown. `read_column` returns the values of a column in all splits.
    """
    features = next(iter(features_by_split.values()))
    names = [
        find_column(
            "label",
            name,
            features,
            has_matching_type=get_declared_names,
            common_names=LABEL_COLUMN_NAMES,
            dataset=options.dataset,
        )
        for name in options.label_column or (None,)
    ]
    for split, others in features_by_split.items():
        if missing := [name for name in names if name not in others]:
            raise ValueError(
                f"{options.dataset}: the split {split!r} has no labels in the column "
                f"{missing[0]!r}. Set `dataset` to the files of the other splits"
            )

    declared = {
        name: list_declared_names([each[name] for each in features_by_split.values()])
        for name in names
    }
    values = {
        name: list(read_column(name))
        for name in names
        if not declared[name] or get_item_type(features[name]) is not None
    }
    form = find_label_form(options, names, features, values, declared)
    if form == "class columns":
        return LabelReader(
            "multi_label_classification", form, names, [LabelColumn("labels", names)]
        )

    columns = []
    for name in names:
        spellings = declared[name] or list_spellings(options, name, values[name], form)
        if declared[name] and options.label_names not in (None, tuple(declared[name])):
            raise ValueError(
                f"`label_names` has no effect on {options.dataset}, which has the labels "
                f"{', '.join(map(repr, declared[name][:20]))}. Remove `label_names`"
            )
        classes = list(dict.fromkeys(str(get_class_name(each)) for each in spellings))
        columns.append(LabelColumn(name, classes, get_declared_names(features[name])))
        warn_about_similar_labels(options.dataset, name, spellings)
    kind: LabelKind = "single_label_classification"
    if form != "value":
        kind = "multi_label_classification"
    elif len(names) > 1:
        kind = "multi_task"
    return LabelReader(kind, form, names, columns, options.label_separator)


def find_label_form(
    options: DataOptions,
    names: Sequence[str],
    features: Features,
    values: Mapping[str, list[Any]],
    declared: Mapping[str, list[str]],
) -> LabelForm:
    """Return how the rows contain their labels. Raise ValueError if they contradict the options."""
    has_bits = [bool(values.get(name)) and all(map(is_bit, values[name])) for name in names]
    if len(names) > 1 and all(has_bits):
        return "class columns"
    has_lists = [
        name
        for name in names
        if options.label_separator
        or get_item_type(features[name]) is not None
        or any(parse_list(value) is not None for value in values.get(name, []))
    ]
    if not has_lists:
        return "value"
    if len(names) > 1:
        raise ValueError(
            f"{options.dataset}: several label columns require one label per image, but "
            f"{has_lists[0]!r} has lists. Set one `label_column`, or omit `label_separator`"
        )
    lists = [split_labels(value, None) for value in values[names[0]] if value not in (None, "")]
    lengths = set(map(len, lists))
    if options.label_separator or len(lengths) != 1 or lengths == {1}:
        return "list"
    if not all(map(is_bit, chain.from_iterable(lists))):
        return "list"
    class_names = options.label_names or declared[names[0]]
    if lengths != {len(class_names)}:
        (length,) = lengths
        found = f", not {len(class_names)}" if class_names else ""
        raise ValueError(
            f"{options.dataset}: each value of {names[0]!r} has {length} places with 0 or 1. Set "
            f"`label_names` to the {length} names of these classes, in this order{found}"
        )
    return "vector"


def is_bit(value: Any) -> bool:
    return str(value).lower() in BITS


def list_spellings(
    options: DataOptions, name: str, values: Iterable[Any], form: LabelForm
) -> list[str]:
    """Return the different labels of a column as they are written; numbers are sorted by value."""
    if options.label_names is not None:
        return list(options.label_names)
    spellings: set[str] = set()
    for value in values:
        labels = [value] if form == "value" else split_labels(value, options.label_separator)
        if any(isinstance(label, list | dict) for label in labels):
            raise ValueError(
                f"{options.dataset}: the column {name!r} has no class labels, but values such as "
                f"{value!r:.60}. Set `label_column`"
            )
        spellings.update(text for label in labels if (text := spell_label(label)) is not None)

    are_numbers = all(map(NUMBER.fullmatch, spellings))
    if are_numbers and not all(float(text).is_integer() for text in spellings):
        raise ValueError(
            f"{options.dataset}: the column {name!r} has decimal numbers, which are no class "
            "labels. Set `label_column` to another column, or `label_names` to these numbers"
        )
    if form == "value" and spellings and all(text[0] + text[-1] == "[]" for text in spellings):
        raise ValueError(
            f"{options.dataset}: the labels of {name!r} look like lists, such as "
            f"{min(spellings)!r:.60}, but cannot be read. Write them as JSON, such as "
            '["cat", "dog"], or as text with `label_separator`'
        )
    return sorted(spellings, key=get_sort_key)


def get_sort_key(text: str) -> tuple[float, str]:
    """Return the key that sorts whole numbers by value, before other text."""
    is_whole = text.removeprefix("-").isdecimal()
    return (int(text) if is_whole else math.inf, text)


def warn_about_similar_labels(dataset: str, column: str, spellings: Sequence[str]) -> None:
    """Log a warning about labels that look alike, if there are any.

    They differ only in case, white space, invisible characters or their form in Unicode. Labels
    that are equal in the form NFC are one class.
    """
    groups: dict[str, list[str]] = {}
    for name in spellings:
        visible = "".join(each for each in name if unicodedata.category(each) != "Cf")
        key = " ".join(unicodedata.normalize("NFKC", visible).split()).casefold()
        groups.setdefault(key, []).append(name)
    parts = []
    for group in groups.values():
        if len(group) > 1:
            is_one = len(set(map(get_class_name, group))) == 1
            text = " and ".join(map(ascii, group))
            parts.append(f"{text} ({'one class' if is_one else 'separate classes'})")
    if parts:
        warn_on_first_process(
            f"WARNING: {dataset}: labels of {column!r} differ only in case, white space, invisible "
            f"characters or Unicode form: {', '.join(parts[:10])}. Give each class one name"
        )


def split_labels(value: Any, separator: str | None) -> list[Any]:
    """Return the labels in one value.

    They are the items of a list, the text between separators, or the value itself.
    """
    items = value if isinstance(value, list) else parse_list(value)
    if items is not None:
        return items
    if separator is None or not isinstance(value, str):
        return [value]
    return [label.strip() for label in value.split(separator)]  # empty text is a missing label


def parse_list(value: Any) -> list[Any] | None:
    """Return the list that a text such as `["a", "b"]` writes, or None for another value."""
    if not isinstance(value, str) or not (value.startswith("[") and value.endswith("]")):
        return None
    try:
        return list(ast.literal_eval(value))
    except (ValueError, SyntaxError, TypeError):
        return None


def spell_label(value: Any) -> str | None:
    """Return a label as it is written, or None for a missing label.

    Whole numbers have no decimal point; truth values are True and False.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if str(value).strip() else None


def get_class_name(value: Any) -> str | None:
    """Return the name of the class of a label, which is its spelling in the Unicode form NFC."""
    text = spell_label(value)
    return None if text is None else unicodedata.normalize("NFC", text)


# Columns ------------------------------------------------------------------------------------------


def find_image_column(options: DataOptions, features: Features) -> str:
    """Return the name of the column of images or image paths, which has no labels."""
    label_columns = options.label_column or [
        name for name in features if name.lower() in LABEL_COLUMN_NAMES
    ]
    candidates = {name: each for name, each in features.items() if name not in label_columns}
    if options.image_column is None and len(candidates) == 1 < len(features):
        return next(iter(candidates))
    return find_column(
        "image",
        options.image_column,
        candidates,
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
    column_by_name = {column.lower(): column for column in matching_columns or features}
    for common_name in common_names:
        if common_name in column_by_name:
            return column_by_name[common_name]

    if len(features) < 2:
        raise ValueError(
            f"{dataset} has no {kind} column: its first line names {len(features)} column(s) "
            f"({', '.join(features)}), separated by commas, semicolons, tabs or bars. Add one"
        )
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


def get_declared_names(feature: Any) -> tuple[str, ...] | None:
    """Return the names of the `ClassLabel` of a column of labels or lists of labels, or None."""
    for column_type in (feature, get_item_type(feature)):
        if type(column_type).__name__ == "ClassLabel":
            return tuple(column_type.names)
    return None


def list_declared_names(features: Iterable[Any]) -> list[str]:
    """Return the label names that the splits declare: those of the first one, then new ones."""
    names = (get_declared_names(feature) or () for feature in features)
    return list(dict.fromkeys(chain.from_iterable(names)))


def get_item_type(feature: Any) -> Any:
    """Return the item type of a list column, or None for any other column."""
    if isinstance(feature, list):
        return feature[0]
    return feature.feature if type(feature).__name__ in ("List", "LargeList", "Sequence") else None
