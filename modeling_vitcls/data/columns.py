"""Columns of a table that are neither images nor labels: its own splits, and groups of images.

split      train, validation or test of each row, in any usual spelling (--split-column)
patient    rows of one group are on one side of every split (--group-column)
"""

import re
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from ..runtime.errors import format_name_list
from .folder_layout import SPLIT_BY_FOLDER_NAME, SPLIT_ORDER
from .labels import get_class_name
from .options import DataOptions


SPLIT_COLUMN_NAMES = ("split", "subset", "partition", "set", "data_split")
# columns whose rows with one value usually show the same thing
GROUP_COLUMN_NAME = re.compile(
    r"(patient|subject|person|individual|animal|camera|video|session|site|location|scene|sequence)"
    r"s?([ _-]?(id|no|nr|number|name))?",
    re.IGNORECASE,
)


def divide_by_column(splits: Any, options: DataOptions) -> tuple[Any, dict[str, str]]:
    """Divide the only split of a table by its column of splits.

    Returns:
        The splits by name, and the fact about the column, if there is one.

    Raises:
        ValueError: if `split_column` does not exist or contains other values, or if the dataset has
            several splits.
    """
    if options.split_column is not None and len(splits) > 1:
        raise ValueError(
            f"`split_column` has no effect on {options.dataset}, which has the splits "
            f"{', '.join(splits)}. Remove `split_column`"
        )
    if len(splits) > 1:
        return splits, {}
    (dataset,) = splits.values()
    features = dataset.features or {}
    column = options.split_column or next(
        (name for name in features if name.lower() in SPLIT_COLUMN_NAMES), None
    )
    if column is None or column in (options.label_column or ()):
        return splits, {}
    if column not in features:
        raise ValueError(
            f"{options.dataset} has no column {column!r}. Choose one of {', '.join(features)}"
        )

    names = read_names(dataset, column)
    parts = [SPLIT_BY_FOLDER_NAME.get((name or "").strip().lower()) for name in names]
    unknown = sorted({str(name) for name, part in zip(names, parts, strict=True) if part is None})
    if unknown:
        values = format_name_list([repr(name) for name in unknown])
        if options.split_column is None and len(unknown) == len(set(names)):
            return splits, {"splits": f"the column {column!r} is not used: it contains {values}"}
        raise ValueError(
            f"{options.dataset}: the column {column!r} contains {values}. Its values must be "
            "train, validation or test; rename or remove the column if it means something else"
        )
    divided = {
        split: dataset.select([row for row, part in enumerate(parts) if part == split])
        for split in SPLIT_ORDER
        if split in parts
    }
    counts = ", ".join(f"{split} {len(part):,}" for split, part in divided.items())
    return divided, {"splits": f"column {column!r}: {counts} rows"}


def read_groups(
    options: DataOptions, datasets: Mapping[str, Any], used_columns: Collection[str]
) -> tuple[dict[str, np.ndarray], str | None]:
    """Return the number of the group of each row by split, and the fact about groups.

    A row without a value is a group of its own. Without `group_column`, there are no groups, and
    the fact is about a column that could contain them.
    """
    features = next(iter(datasets.values())).features
    column = options.group_column
    if column is not None and any(column not in part.features for part in datasets.values()):
        raise ValueError(
            f"{options.dataset} has no column {column!r}. Choose one of {', '.join(features)}"
        )
    if column is None:
        for name in features:
            if GROUP_COLUMN_NAME.fullmatch(name) and name not in used_columns:
                values = [value for part in datasets.values() for value in read_names(part, name)]
                if 1 < len(set(values)) < len(values):
                    return {}, (
                        f"the column {name!r} is not used: images with the same value may be on "
                        f"both sides of a split. To keep them together, set `group_column={name!r}`"
                    )
        return {}, None

    names = [read_names(part, column) for part in datasets.values()]
    groups, _ = pd.factorize(np.array(list(chain.from_iterable(names)), object))
    is_missing = groups < 0
    groups[is_missing] = np.arange(is_missing.sum()) + groups.max(initial=-1) + 1
    parts = np.split(groups, np.cumsum(list(map(len, names)))[:-1])
    num_groups = groups.max(initial=-1) + 1
    return dict(zip(datasets, parts, strict=True)), f"column {column!r}: {num_groups:,} groups"


def read_column(dataset: Any, column: str) -> list[Any]:
    """Return all values of one column."""
    return dataset.select_columns([column])[:][column]  # type: ignore[no-any-return]


def read_names(dataset: Any, column: str) -> list[str | None]:
    """Return the values of a column as text; None for an empty one."""
    return [get_class_name(value) for value in read_column(dataset, column)]
