"""Labels of a dataset: every cell becomes label names, and one function turns names into indices.

    cell                                                      label names (`read_names`)
    text, a number, a truth value                             its spelling: 001, 1 (also for 1.0), True
    the index of a `ClassLabel`                               the name that its split declares
    a list, text like ["a", "b"], text with a separator       one for each item
    a list with 0 or 1 for each class                         the classes that have a 1
    0 and 1 in one column for each class                      the names of these columns

    kind                          label of one image (`LabelSpace.index`)    batch of labels (`collate`)
    multi_task                    {task: class index or -100}                {task: [B] int64}
    multi_label_classification    sorted list of class indices               [B, classes] float32, 0 or 1
    single_label_classification   class index                                [B] int64

The classes are declared by the dataset, set by --label-names, or the sorted distinct names, in this
order of precedence. Each split may declare them in an order of its own. This file also finds the
columns of images and labels.
"""

import ast
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import torch

from ..model.configuration_vitcls import ExtraHead, ViTCLSConfig
from ..model.heads_vitcls import IGNORED_LABEL
from ..runtime.errors import warn_on_first_process


IMAGE_COLUMN_NAMES = tuple(
    "image img picture photo pixel_values file_name filename file path jpg png".split()
)
LABEL_COLUMN_NAMES = ("label", "labels", "class", "target", "category", "fine_label", "cls")
NO_LABELS = "no label"  # text for an image without labels in a multi-label dataset

MIN_JOINED_LABELS = 3  # number of classes with the same separator that look like several labels

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
        """Index the classes by column and by class name in the Unicode form NFC."""
        return {
            column: {normalize_name(name): index for index, name in enumerate(names)}
            for column, names in self.columns.items()
        }

    def to_config_values(self) -> dict[str, Any]:
        """Write the labels as fields of ViTCLSConfig."""
        if self.kind == "multi_task":
            return {"tasks": self.columns}
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
            "problem_type": self.kind,
        }

    def index(self, names: Mapping[str, Sequence[Sequence[str] | None]], where: str) -> Any:
        """Turn the labels of images into indices. No other function turns names into integers.

        Args:
            names: label names of each image by column; None for an image whose labels are missing,
                which has the label -100.
            where: name of the images in error messages.

        Returns:
            A list of indices, of lists of indices, or of {task: index}.

        Raises:
            ValueError: if a name is not one of the classes. The message contains the row.
        """
        indices = {}
        for column, rows in names.items():
            index_by_name = self.index_by_name[column]
            for row, each in enumerate(rows):
                for name in each or ():
                    if normalize_name(name) not in index_by_name:
                        raise ValueError(
                            f"{where}: row {row} has the label {name!r}, not one of the "
                            f"{len(index_by_name)} classes"
                        )
            indices[column] = [
                [IGNORED_LABEL]
                if each is None
                else [index_by_name[normalize_name(name)] for name in each]
                for each in rows
            ]

        if self.kind == "multi_label_classification":
            (lists,) = indices.values()
            return [IGNORED_LABEL if IGNORED_LABEL in each else sorted(set(each)) for each in lists]
        values = [[next(iter(each), IGNORED_LABEL) for each in rows] for rows in indices.values()]
        if self.kind == "single_label_classification":
            return values[0]
        return [dict(zip(indices, row, strict=True)) for row in zip(*values, strict=True)]

    def list_names(self, labels: Any) -> dict[str, list[list[str]]]:
        """List the label names of images by column, the input of `index`."""
        if self.kind == "multi_task":
            indices = {task: [[label[task]] for label in labels] for task in self.columns}
        elif self.kind == "multi_label_classification":
            indices = dict.fromkeys(self.columns, labels)
        else:
            indices = {column: [[label] for label in labels] for column in self.columns}
        return {
            column: [
                [names[index] for index in each if is_known(index)] for each in indices[column]
            ]
            for column, names in self.columns.items()
        }

    def collate(self, labels: list[Any]) -> Any:
        """Batch the labels of images as tensors, in the format of the kind of labels."""
        if self.kind == "multi_task":
            return {
                task: torch.tensor([label[task] for label in labels], dtype=torch.int64)
                for task in self.columns
            }
        if self.kind == "multi_label_classification":
            multi_hot = torch.zeros(len(labels), len(self.names))
            for row, indices in enumerate(labels):
                multi_hot[row, indices] = 1
            return multi_hot
        return torch.tensor(labels, dtype=torch.int64)

    def format_label(self, label: Any) -> str | None:
        """Write a label as text; None for an unknown label.

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
        if isinstance(label, list):
            return ", ".join(self.names[index] for index in label) or NO_LABELS
        return self.names[label] if is_known(label) else None


# label space of datasets that are read without labels
UNLABELED = LabelSpace("single_label_classification", {})


def get_label_space(config: ViTCLSConfig) -> LabelSpace:
    """Read the label space of a classifier from its configuration."""
    if config.tasks:
        return LabelSpace("multi_task", config.task_labels())
    id2label: dict[Any, str] = dict(config.id2label or {})
    names = [id2label[index] for index in range(len(id2label))]
    if config.problem_type == "multi_label_classification":
        return LabelSpace("multi_label_classification", {"label": names})
    return LabelSpace("single_label_classification", {"label": names})


def get_heads(config: ViTCLSConfig, threshold: float | None = None) -> dict[str, ExtraHead]:
    """Find the labels of a model by task: its own (an empty name without tasks), then the added tasks.

    `threshold` is the probability from which one of several own labels is predicted. Raise ValueError
    for a model without labels.
    """
    heads: dict[str, ExtraHead] = {}
    if not config.tasks and (config.num_labels or not config.extra_heads):
        check_is_classifier(config)
        kind: Any = (
            "multi_label_classification"
            if is_multi_label(config)
            else "single_label_classification"
        )
        names = get_label_space(config).names
        heads[""] = ExtraHead(names, problem_type=kind, threshold=threshold)
    for task, names in config.task_labels().items():
        heads[task] = ExtraHead(names)
    return heads | config.get_added_tasks()


def check_is_classifier(config: ViTCLSConfig) -> None:
    """Raise ValueError for a model without classes, or for regression."""
    if not config.tasks and (not config.num_labels or config.problem_type == "regression"):
        problem = "was trained for regression" if config.num_labels else "has no classifier"
        raise ValueError(
            f"labels require a classifier, but the model {problem}. Fine-tune a classifier, or "
            "write features with `vitcls predict --features cls`"
        )


def is_known(label: int | None) -> bool:
    """Return whether a label is a class index.

    Missing labels are None, -100 (IGNORED_LABEL) or another negative value.
    """
    return label is not None and label >= 0


def is_multi_label(config: ViTCLSConfig) -> bool:
    """Return whether a sigmoid is applied to each logit.

    As in transformers, a model with a single label may be multi-label as well.
    """
    return not config.tasks and (
        config.problem_type == "multi_label_classification" or config.num_labels == 1
    )


# Reading ------------------------------------------------------------------------------------------


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
BITS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


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
        columns: label columns. Several columns of 0 and 1 are classes, other ones are tasks.
        dataset: name of the dataset in error messages.
        separator: separator of several labels in one text.
        label_names: names of all classes, if the dataset does not declare them.

    Returns:
        The label space, and the labels of each split in the format of its kind.

    Raises:
        ValueError: if a column contains no class labels, or a row has a label that is not a class.
    """
    kind: LabelKind = "multi_task" if len(columns) > 1 else "single_label_classification"
    cells = {
        column: {split: read_column(table, column) for split, table in tables.items()}
        for column in columns
    }
    if len(columns) > 1 and all(
        get_bit(cell) is not None for parts in cells.values() for cell in chain(*parts.values())
    ):
        kind = "multi_label_classification"
        classes = {"labels": list(columns)}
        names = {"labels": {split: name_columns(cells, split) for split in tables}}
    else:
        classes, names = {}, {}
        for column, parts in cells.items():
            features = {split: table.features[column] for split, table in tables.items()}
            where = f"{dataset}: the column {column!r}"
            classes[column], names[column], has_lists = read_label_names(
                parts, features, where, separator, label_names
            )
            if has_lists and len(columns) > 1:
                raise ValueError(
                    f"{where} has lists, but several label columns require one label per image. "
                    "Set one `label_column`, or omit `label_separator`"
                )
            if has_lists:
                kind = "multi_label_classification"

    # One label space for all splits, so an index is the same class in each of them.
    space = LabelSpace(kind, classes)
    labels = {}
    for split in tables:
        rows = {column: parts[split] for column, parts in names.items()}
        labels[split] = space.index(rows, f"{dataset}, split {split!r}")
    return space, labels


def read_column(table: Any, column: str) -> list[Any]:
    """Read all values of one column."""
    return table.select_columns([column])[:][column]  # type: ignore[no-any-return]


def name_columns(
    cells: Mapping[str, Mapping[str, list[Any]]], split: str
) -> list[list[str] | None]:
    """Name, for each row of a split, the columns that contain 1, true or True."""
    rows = zip(*(parts[split] for parts in cells.values()), strict=True)
    return [[name for name, cell in zip(cells, row, strict=True) if get_bit(cell)] for row in rows]


def read_label_names(
    cells: Mapping[str, list[Any]],
    features: Mapping[str, Any],
    where: str,
    separator: str | None,
    label_names: Sequence[str] | None,
) -> tuple[list[str], dict[str, list[list[str] | None]], bool]:
    """Read the classes of a column, the label names of each image, and whether cells are lists.

    What the cells contain is decided for all splits together, because a short one could mislead.
    """
    declared = {split: get_declared_names(feature) for split, feature in features.items()}
    classes = list(dict.fromkeys(chain(*(names or () for names in declared.values()))))
    is_declared = bool(classes)
    if is_declared and label_names is not None and list(label_names) != classes:
        raise ValueError(
            f"{where} declares the labels {', '.join(map(repr, classes[:20]))}, so `label_names` "
            "has no effect. Remove `label_names`"
        )
    classes = classes or list(label_names or ())

    distinct = list({repr(cell): cell for cell in chain(*cells.values())}.values())
    lists = [split_labels(cell, separator) for cell in distinct]
    for cell, items in zip(distinct, lists, strict=True):
        if any(isinstance(item, list | dict) for item in items):
            raise ValueError(
                f"{where} has no class labels, but values such as {cell!r:.60}. Set `label_column`"
            )
    has_lists = separator is not None or lists != [[cell] for cell in distinct]
    filled = [items for items in lists if items not in ([None], [""])]
    lengths = set(map(len, filled))
    has_vectors = (
        has_lists
        and separator is None
        and len(lengths - {1}) == len(lengths) == 1
        and all(get_bit(item) is not None for item in chain(*filled))
    )
    if has_vectors and lengths != {len(classes)}:
        (length,) = lengths
        raise ValueError(
            f"{where} has {length} places with 0 or 1 in each value. Set `label_names` to the "
            f"{length} names of these classes, in this order"
            f"{f', not {len(classes)}' if classes else ''}"
        )

    names = {
        split: read_names(values, declared[split] or classes, is_declared, separator, has_vectors)
        for split, values in cells.items()
    }
    labeled = filter(None, chain(*names.values()))
    spellings = classes or sort_spellings({*chain(*labeled)}, where, has_lists)
    classes = list(dict.fromkeys(map(normalize_name, spellings)))
    warn_about_similar_classes(where, classes)
    if separator is not None or not has_lists:
        warn_about_separator(where, classes)
    return classes, names, has_lists


def read_names(
    values: Sequence[Any],
    classes: Sequence[str],
    is_declared: bool,
    separator: str | None,
    has_vectors: bool,
) -> list[list[str] | None]:
    """Turn the cells of a column into label names; None for a cell without a label.

    Args:
        values: cells of one label column.
        classes: names that this split declares or the user has given; empty if there are none.
        is_declared: whether numbers are always indices of `classes`. If the user gives the names,
            numbers are indices unless one of the names is a number itself.
        separator: separator of several labels in one text.
        has_vectors: whether lists have one place for each of `classes`, with 0 or 1.
    """
    name_by_index: dict[str, str] = {}
    # If names are numbers, a cell with 3 is the name "3", and not the class with this index.
    if is_declared or not any(name.removeprefix("-").isdecimal() for name in classes):
        name_by_index = {str(index): name for index, name in enumerate(classes)}

    def find_names(value: Any) -> list[str] | None:
        items = split_labels(value, separator)
        if has_vectors and len(items) == len(classes):
            return [name for name, item in zip(classes, items, strict=True) if get_bit(item)]
        names = [
            name_by_index.get(text, f"index {text}" if is_declared else text)
            for item in items
            if (text := spell_label(item)) is not None
            and not (is_declared and text == "-1")  # a missing label
        ]
        # an empty list says that the image has none of the labels
        return names if names or not items else None

    # Large tables repeat few cells. By spelling, because 1 and True are the same key of a dict, and
    # lists are none.
    distinct = {repr(value): value for value in values}
    names = {spelling: find_names(value) for spelling, value in distinct.items()}
    return [names[repr(value)] for value in values]


def get_bit(value: Any) -> bool | None:
    """Read 0 or 1, false or true, also as text, as a truth value; None for other values."""
    return BITS.get(str(value).lower())


def sort_spellings(spellings: set[str], where: str, has_lists: bool) -> list[str]:
    """Sort the different labels of a column; numbers by value. Raise ValueError if they are none."""
    are_numbers = all(map(NUMBER.fullmatch, spellings))
    if are_numbers and not all(float(text).is_integer() for text in spellings):
        raise ValueError(
            f"{where} has decimal numbers, which are no class labels. Set `label_column` to "
            "another column, or `label_names` to these numbers"
        )
    if not has_lists and spellings and all(text[0] + text[-1] == "[]" for text in spellings):
        raise ValueError(
            f"{where} has labels that look like lists, such as {min(spellings)!r:.60}, but cannot "
            'be read. Write them as JSON, such as ["cat", "dog"], or as text with `label_separator`'
        )
    # Numbers by value, or class 10 would come before class 2.
    return sorted(
        spellings,
        key=lambda text: (int(text) if text.removeprefix("-").isdecimal() else math.inf, text),
    )


def warn_about_similar_classes(where: str, names: Sequence[str]) -> None:
    """Log a warning about classes whose names differ only in case, white space or invisible characters."""
    groups: dict[str, list[str]] = {}
    for name in names:
        visible = "".join(each for each in name if unicodedata.category(each) != "Cf")
        key = " ".join(unicodedata.normalize("NFKC", visible).split()).casefold()
        groups.setdefault(key, []).append(name)
    alike = [" and ".join(map(ascii, group)) for group in groups.values() if len(group) > 1]
    if alike:
        warn_on_first_process(
            f"WARNING: {where} has separate classes that differ only in case, white space or "
            f"invisible characters: {', '.join(alike[:10])}. Give each class one name"
        )


def warn_about_separator(where: str, names: Sequence[str]) -> None:
    """Log a warning if several classes look like lists of labels: `red|round`, `green|round`."""
    for separator in "|;":
        joined = [name for name in names if separator in name]
        if len(joined) >= MIN_JOINED_LABELS:
            warn_on_first_process(
                f"WARNING: {where} has {len(joined)} classes such as {joined[0]!r}. If these are "
                f"several labels of an image, set `label_separator={separator!r}` "
                f"(--label-separator '{separator}')"
            )


def split_labels(value: Any, separator: str | None) -> list[Any]:
    """Split one value into its labels.

    They are the items of a list, the text between separators, or the value itself.
    """
    items = value if isinstance(value, list) else parse_list(value)
    if items is not None:
        return items
    if separator is None or not isinstance(value, str):
        return [value]
    return [label.strip() for label in value.split(separator)]  # empty text is a missing label


def parse_list(value: Any) -> list[Any] | None:
    """Parse a text such as `["a", "b"]` as a list; None for another value."""
    if not isinstance(value, str) or not (value.startswith("[") and value.endswith("]")):
        return None
    try:
        return list(ast.literal_eval(value))
    except (ValueError, SyntaxError, TypeError):
        return None


def spell_label(value: Any) -> str | None:
    """Spell a label as its file does, so that 001 stays 001; None for a missing label.

    Whole numbers have no decimal point; truth values are True and False.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if str(value).strip() else None


def normalize_name(name: str) -> str:
    """Make names comparable (Unicode form NFC): macOS and Windows write é in two ways."""
    return unicodedata.normalize("NFC", name)


# Columns ------------------------------------------------------------------------------------------


def find_image_column(
    dataset: str,
    features: Features,
    column: str | None,
    label_columns: Sequence[str] | None = None,
) -> str:
    """Find the column of images or image paths, which has no labels."""
    excluded = label_columns or [name for name in features if name.lower() in LABEL_COLUMN_NAMES]
    candidates = {name: each for name, each in features.items() if name not in excluded}
    if column is None and len(candidates) == 1 < len(features):
        return next(iter(candidates))
    return find_column("image", column, candidates, is_image_feature, IMAGE_COLUMN_NAMES, dataset)


def find_label_columns(
    dataset: str, tables: Mapping[str, Any], columns: Sequence[str] | None
) -> list[str]:
    """Find the label columns, which all splits must have."""
    features = next(iter(tables.values())).features
    names = [
        find_column("label", name, features, get_declared_names, LABEL_COLUMN_NAMES, dataset)
        for name in columns or (None,)
    ]
    for split, table in tables.items():
        if missing := [name for name in names if name not in table.features]:
            raise ValueError(
                f"{dataset}: the split {split!r} has no labels in the column {missing[0]!r}. Set "
                "`dataset` to the files of the other splits"
            )
    return names


def find_column(
    kind: str,
    name: str | None,
    features: Features,
    has_matching_type: Callable[[Any], Any],
    common_names: tuple[str, ...],
    dataset: str,
) -> str:
    """Find the column of a kind.

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

    raise ValueError(
        f"{dataset}: cannot identify the {kind} column among {', '.join(features)}. Set "
        f"`{kind}_column`, or write a table whose columns are separated by commas, semicolons, tabs "
        "or bars"
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
    """Read the names of the `ClassLabel` of a column of labels or lists of labels, if any."""
    # The types of lists are a list, and classes with the type of their items.
    item = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return tuple(item.names) if type(item).__name__ == "ClassLabel" else None
