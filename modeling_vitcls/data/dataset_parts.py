"""The parts of one or several datasets: `--dataset labels more.csv collection`.

A part is a split of a dataset: its images, and a table with the other columns. Several datasets have one
kind of labels, and label columns of any names, for which the names of the first are used. The parts of
one split are joined when their labels are read, and copies later, by their content (splits.py).

One of several datasets may have no labels: a folder without class folders, or a table of images alone.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..runtime.errors import format_name_list
from .columns import (
    CHECKSUM_COLUMN,
    build_images,
    find_image_column,
    find_label_columns,
    find_stem,
    is_image_feature,
    read_column,
)
from .folder_layout import FOLDER_COLUMN
from .images import DatasetImages, LabeledImages, resolve_path
from .options import DataOptions


@dataclass(frozen=True)
class Source:
    """An opened dataset."""

    name: str  # Of the file or folder, or the id on the Hub
    title: str  # In messages
    folder: Path  # To which image paths are relative
    tables: Mapping[str, Any]  # `datasets.Dataset` by split

    @property
    def first(self) -> Any:
        """The table of the first split. All have the same columns."""
        return next(iter(self.tables.values()))


@dataclass(frozen=True)
class Part:
    """A split of a dataset."""

    split: str
    table: Any  # `datasets.Dataset`
    images: DatasetImages
    image_column: str
    label_columns: list[str]  # Empty without labels, or if they are not used


def read_part(source: Source, split: str, options: DataOptions, has_labels: bool) -> Part:
    """Find the images of a split, and its label columns if it has labels.

    Raise ValueError if they are not found.
    """
    table = source.tables[split]
    column = find_image_column(
        source.title, source.first, source.folder, options.image_column, options.label_column
    )
    images = build_images(table, column, source.folder, source.title)
    labels = []
    if has_labels:
        labels = find_label_columns(source.title, source.tables, options.label_column, column)
    return Part(split, table, images, column, labels)


def read_parts_of_several(
    sources: Sequence[Source], options: DataOptions, use_labels: bool
) -> dict[str, Part]:
    """Read the splits of several datasets as parts with the same label columns.

    Raise ValueError if the images or labels of a dataset are not found, or no dataset has labels.
    """
    folders = [source.folder.resolve() for source in sources if source.folder.is_dir()]
    root = Path(os.path.commonpath(folders)) if folders else Path()
    asked = options.label_column or ()
    has_asked = [
        all(find_stem(source.first.features, each) for each in asked) for source in sources
    ]
    parts = {}
    for source, has_own in zip(sources, has_asked, strict=True):
        features = source.first.features
        own_options = options
        if FOLDER_COLUMN in features:
            own_options = replace(options, image_column=None, label_column=("label",))
        elif any(has_asked) and not has_own:  # It has other names for the columns
            own_options = replace(options, label_column=None)
        has_labels = use_labels and len(features.keys() - {CHECKSUM_COLUMN}) > 1
        for split in source.tables:
            part = read_part(source, split, own_options, has_labels)
            images = unify_images(part.images, root)
            parts[f"{split} of {source.title}"] = replace(part, images=images)

    names = next((part.label_columns for part in parts.values() if part.label_columns), [])
    if use_labels and not names:
        raise ValueError(
            f"there are no labels in {format_name_list(list(parts))}. Add a folder with one folder per "
            "class, or a table of images and labels"
        )
    return {key: rename_labels(part, names, key) for key, part in parts.items()}


def unify_images(images: DatasetImages, root: Path) -> DatasetImages:
    """Give the images of any dataset one type, {"path", "bytes"}, and names relative to `root`."""
    import datasets

    table, column = images.dataset, images.column
    if not is_image_feature(table.features[column]):
        paths = [resolve_path(images.folder, path) for path in table[:][column]]
        table = datasets.Dataset.from_dict({column: paths})
    table = table.cast_column(column, datasets.Image(decode=False))
    return replace(images, dataset=table.rename_columns({column: "image"}), folder=root)


def rename_labels(part: Part, names: list[str], where: str) -> Part:
    """Give the label columns of a part the names of another one. Without labels, they are empty."""
    table, own = part.table, part.label_columns
    if own and len(own) != len(names):
        raise ValueError(
            f"{where}: the labels are in {format_name_list(own)}, but those of another dataset are in "
            f"{format_name_list(names)}. Set `label_column`"
        )
    for old, new in zip(own or names, names, strict=True):
        if own and old == new:
            continue
        others = table.select_columns([each for each in table.features if each != new])
        if own and old in others.features:
            table = others.rename_column(old, new)  # With the names that it declares
        else:
            values = read_column(table, old) if own else [None] * len(table)
            table = others.add_column(new, values)
    return replace(part, table=table, label_columns=names)


def join_parts(
    parts: Mapping[str, Part], images: Mapping[str, LabeledImages]
) -> dict[str, LabeledImages]:
    """Join the images of the parts of each split."""
    joined: dict[str, LabeledImages] = {}
    for key, part in parts.items():
        own = images[key]
        joined[part.split] = joined[part.split].join(own) if part.split in joined else own
    return joined
