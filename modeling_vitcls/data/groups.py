"""Groups of images, which are on one side of every split: named by a person, or found in a column.

find_group_column    the column that a person names, or the folders below classes
UnusedColumns        other columns, which may contain groups: a line names them
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ..runtime.errors import format_name_list
from .cells import NUMBER, warn_about_similar_names
from .columns import is_image_feature, read_texts
from .folder_layout import FOLDER_COLUMN


# Groups are found by their shape: a few rows of one class per value. If they have several classes, as
# the photos of a patient may, the name of the column can tell, or that many texts repeat.
MAX_GROUP_SIZE = 30  # Mean number of rows per value; more are a finer class
MIN_PLACES = 5  # Fewer texts may be a color or a quality
MAX_ROWS_OF_GROUPS = 100_000  # Reading all columns of larger tables takes seconds
MAX_COLUMNS_OF_GROUPS = 50  # The first ones; reading all of a wide table takes minutes
GROUP_COLUMN_NAME = re.compile(
    r"(patient|subject|person|individual|animal|camera|video|session|site|location|scene|sequence|"
    r"deployment|station|trap|burst|event|survey|transect|trip|day|date|"  # Wildlife, fishing
    r"farm|herd|field|plot|block|tree|plant|pot|tank|"  # Agriculture
    r"lot|batch|wafer|machine|line|device|sensor|scanner|run|"  # Industry
    r"case|specimen|slide|plate|well|donor|study|series|exam|hospital|center|centre|"  # Medicine
    r"listing|property|house|building|shop|store|seller|photographer|observer|collection|artist|author)"
    r"s?([ _-]?(id|no|nr|number|name|code|key))?"
    # The own division of a dataset
    r"|k?_?folds?|is_?(train|val|test)\w*|usage|ml_?use|train_test_split",
    re.IGNORECASE,
)
NO_GROUPS = "none"  # The value of `group_column` that ignores the folders below classes


def find_group_column(tables: Mapping[str, Any], column: str | None, dataset: str) -> str | None:
    """Find the column of groups: the one that a person names, or that of the folders below classes."""
    is_folder = FOLDER_COLUMN in next(iter(tables.values())).features
    if column is None and is_folder and any(read_texts(tables, FOLDER_COLUMN, dataset)):
        return FOLDER_COLUMN
    return None if is_folder and column == NO_GROUPS else column


def number_groups(values: Sequence[str | None]) -> np.ndarray:
    """Number the groups [N] by their values; an image without a value is a group of its own."""
    import pandas as pd

    names = [f"\0{row}" if value is None else value for row, value in enumerate(values)]
    return pd.factorize(np.array(names, object))[0]


def describe_groups(values: Sequence[str | None], column: str, dataset: str) -> str:
    """Count the groups of images in a line.

    Args:
        values: of the column, one for each image.
        column: the column, or FOLDER_COLUMN.
        dataset: its name in messages.

    Raises:
        ValueError: if all images are one group.
    """
    counts = Counter(filter(None, values))
    warn_about_similar_names(f"{dataset}: the column {column!r}", sorted(counts))
    if len({*values}) == 1 < len(values):
        raise ValueError(
            f"{dataset}: the column {column!r} has {values[0]!r} in all {len(values):,} rows, so no group "
            "can be held out. Set `group_column` to a column with several values, or omit it"
        )
    num_missing = list(values).count(None)
    if column == FOLDER_COLUMN:
        return (
            f"{len(counts) + num_missing:,}, one for each folder below a class: its images stay together. If they "
            f"are no groups, set `group_column={NO_GROUPS!r}`{describe_shared_names(counts)}"
        )
    fact = f"column {column!r}: {len(counts) + num_missing:,} groups"
    if num_missing:
        fact += f", of which {num_missing:,} are images without a value"
    # It may be a word for a missing value, such as the NA of R
    for largest, size in counts.most_common(1):
        fact += f"; the largest is {largest!r} with {size:,} images"
    return fact


def explain_single_labels(
    values: Sequence[str | None], labels: Sequence[str | None], column: str
) -> str | None:
    """Say why the groups of a column cannot measure one another, if each has one label of its own."""
    pairs = set(zip(values, labels, strict=True))
    if any(len(set(each)) < len(pairs) for each in zip(*pairs, strict=True)):
        return None
    return (
        f"each value of {column} has photos of one label only: "
        f"{format_name_list(sorted(f'{value} {label}' for value, label in pairs))}. Add photos "
        "of each label with other values"
    )


def describe_shared_names(folders: Collection[str]) -> str:
    """Say that most folders below a class have the name of one in another class or split; "" otherwise.

    Names that are numbers alone say nothing. `folders` are paths SPLIT/CLASS/FOLDER.
    """
    names = Counter(folder.rpartition("/")[2] for folder in folders)
    shared = sorted(name for name in names if names[name] > 1 and not name.isdecimal())
    if 2 * len(shared) <= len(names):
        return ""
    return (
        f". Folders of the same name in several classes or splits ({format_name_list(shared)}) are "
        "different groups. If each is one object, such as a patient, name it in a column of metadata.csv, and set "
        "`group_column` to this column"
    )


@dataclass(frozen=True)
class UnusedColumns:
    """Columns of tables that are neither images nor labels.

    Attributes:
        tables: parts with these columns, a `datasets.Dataset` each.
        labels: of all rows, as texts; None if missing.
    """

    tables: tuple[Any, ...]
    labels: list[str | None]

    def join(self, other: "UnusedColumns") -> "UnusedColumns":
        """Append the rows of another dataset; columns that only one of them has are left out."""
        names = [name for name in self.tables[0].features if name in other.tables[0].features]
        tables = [table.select_columns(names) for table in (*self.tables, *other.tables)]
        return UnusedColumns(tuple(tables), [*self.labels, *other.labels])

    def find_groups(self, dataset: str) -> str | None:
        """Look for a column that could contain groups, and describe it if there is one.

        No column is looked for in large tables.
        """
        if len(self.labels) > MAX_ROWS_OF_GROUPS:
            return None
        parts = dict(enumerate(self.tables))
        places = []
        for name, feature in islice(parts[0].features.items(), MAX_COLUMNS_OF_GROUPS):
            if is_image_feature(feature):
                continue
            values = read_texts(parts, name, dataset)
            is_named = GROUP_COLUMN_NAME.fullmatch(name) and 1 < len(set(values)) < len(values)
            if is_named or look_like_groups(values, self.labels):
                return describe_unused(name)
            if look_like_places(values, self.labels):
                places.append(name)
        return describe_unused(places[0]) if places else None


def describe_unused(column: str) -> str:
    """Name a column that may contain groups, and the flags that use it."""
    return (
        f"the column {column!r} is not used: images with the same value may be on both sides of "
        f"a split. To keep them together, set `group_column={column!r}` or, if it names splits, "
        f"`split_column={column!r}`"
    )


def look_like_places(values: Sequence[str | None], labels: Sequence[str | None]) -> bool:
    """Tell whether texts name places or batches, of any trade: there are many, and most have a few rows.

    Numbers are measurements, such as ages and weights, unless the name of their column says otherwise.
    """
    known = [value for value in values if value is not None]
    counts = Counter(known)
    if all(map(NUMBER.fullmatch, counts)) or len(counts) < max(MIN_PLACES, 2 * len({*labels})):
        return False
    repeated = [count for count in counts.values() if count > 1]
    return len(known) <= MAX_GROUP_SIZE * len(counts) and 2 * sum(repeated) >= len(values)


def look_like_groups(values: Sequence[str | None], labels: Sequence[str | None]) -> bool:
    """Tell whether values name objects: most have a few rows, and all rows of each are of one class."""
    import pandas as pd  # Predictions of photos read this file, and need no tables

    table = pd.DataFrame({"value": values, "label": labels}, dtype=object).dropna()
    groups = table.groupby("value")["label"].agg(["size", "nunique"])
    repeated = groups[groups["size"] > 1]
    are_small = len(table) <= MAX_GROUP_SIZE * len(groups)
    has_few_rows = are_small and 2 * table["label"].nunique() <= len(groups)
    is_repeated = 2 * repeated["size"].sum() >= len(table) > 0
    return bool(has_few_rows and is_repeated and (repeated["nunique"] == 1).all())
