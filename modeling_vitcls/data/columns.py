"""Columns of a table that are neither images nor labels: its own splits, and groups of images.

split      train, validation or test of each row, in any usual spelling (--split-column)
patient    rows of one group are on one side of every split (--group-column)
"""

import re
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any

import numpy as np

from ..runtime.errors import format_name_list
from .folder_layout import SPLIT_BY_FOLDER_NAME, SPLIT_ORDER
from .labels import read_column, spell_label


SPLIT_COLUMN_NAMES = ("split", "subset", "partition", "set", "data_split")
# columns whose rows with one value usually show the same thing
GROUP_COLUMN_NAME = re.compile(
    r"(patient|subject|person|individual|animal|camera|video|session|site|location|scene|sequence)"
    r"s?([ _-]?(id|no|nr|number|name))?",
    re.IGNORECASE,
)


def divide_by_column(
    splits: Any, dataset: str, column: str | None, label_columns: Collection[str]
) -> tuple[Any, dict[str, str]]:
    """Divide the only split of a table by its column of splits.

    Returns:
        The splits by name, and the fact about the column, if there is one.

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
        return splits, {}

    names = read_texts(table, column, dataset)
    parts = np.array([SPLIT_BY_FOLDER_NAME.get((name or "").strip().lower(), "") for name in names])
    unknown = sorted({str(name) for name, part in zip(names, parts, strict=True) if not part})
    if unknown:
        values = format_name_list([repr(name) for name in unknown])
        if not is_named and len(unknown) == len(set(names)):
            return splits, {"splits": f"the column {column!r} is not used: it contains {values}"}
        raise ValueError(
            f"{dataset}: the column {column!r} contains {values}. Its values must be train, "
            "validation or test; rename or remove the column if it means something else"
        )
    divided = {
        split: table.select(np.flatnonzero(parts == split))
        for split in SPLIT_ORDER
        if split in parts
    }
    counts = ", ".join(f"{split} {len(part):,}" for split, part in divided.items())
    return divided, {"splits": f"column {column!r}: {counts} rows"}


def read_groups(
    tables: Mapping[str, Any], dataset: str, column: str
) -> tuple[dict[str, np.ndarray], str]:
    """Number the group of each row by split; also return a line about the groups.

    A row without a value is a group of its own.
    """
    import pandas as pd  # 0.2 CPU s, which a prediction of one photo does not need

    names = [read_texts(table, column, dataset) for table in tables.values()]
    groups, _ = pd.factorize(np.array(list(chain(*names)), object))
    is_missing = groups < 0
    groups[is_missing] = np.arange(is_missing.sum()) + groups.max(initial=-1) + 1
    parts = np.split(groups, np.cumsum(list(map(len, names)))[:-1])
    num_groups = groups.max(initial=-1) + 1
    return dict(zip(tables, parts, strict=True)), f"column {column!r}: {num_groups:,} groups"


def find_unused_groups(
    tables: Mapping[str, Any], dataset: str, used_columns: Collection[str]
) -> str | None:
    """Look for a column that could contain groups, and describe it if there is one."""
    for name in next(iter(tables.values())).features:
        if GROUP_COLUMN_NAME.fullmatch(name) and name not in used_columns:
            values = list(chain(*(read_texts(table, name, dataset) for table in tables.values())))
            if 1 < len(set(values)) < len(values):
                return (
                    f"the column {name!r} is not used: images with the same value may be on both "
                    f"sides of a split. To keep them together, set `group_column={name!r}`"
                )
    return None


def read_texts(table: Any, column: str, dataset: str) -> list[str | None]:
    """Return the values of a column as text; None for an empty one. Raise ValueError without it."""
    if column not in table.features:
        raise ValueError(
            f"{dataset} has no column {column!r}. Choose one of {', '.join(table.features)}"
        )
    return list(map(spell_label, read_column(table, column)))
