"""A dataset is a value, and a step returns another one.

    tables = open_tables(options)      --dataset -> a table of each split
    tables.select(choose)              the splits to read; others may hide their labels
    tables.unlabeled()                 -> Dataset: images alone
    tables.read()                      -> Dataset: labels, and groups by value
    dataset.join(other)                another dataset: labels by name, groups by value, facts of both
    dataset.answer(answers, classes)   labels that a person gave, and which images measure a model
    dataset.drop_unlabeled()           images with a label
    dataset.identify()                 keys, copies in one group, one image for all of its rows

A door is its list of steps:

    a run, add-task, add-class     select read join answer drop_unlabeled identify     (splits.py)
    evaluate                       select read join answer                identify     (evaluation_data.py)
    inspect, verify-unchanged      select unlabeled

`read_dataset` has the steps that all doors with labels begin with.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..hub.local_paths import is_local, resolve_name
from ..runtime.errors import format_name_list, warn_on_first_process
from .answers import BELIEVED, apply_answers, read_answers
from .cells import NO_SEPARATOR, normalize_name, sort_names, warn_about_similar_names
from .columns import (
    build_images,
    divide_by_column,
    drop_unlabeled_splits,
    find_image_column,
    find_label_columns,
    find_stem,
    read_labels,
    read_texts,
)
from .copies import check_contradictions
from .folder_layout import FOLDER_COLUMN
from .groups import (
    UnusedColumns,
    describe_groups,
    explain_single_labels,
    find_group_column,
    number_groups,
)
from .image_folder import scan_folder
from .images import NO_CONTENT_KEY, DatasetImages, LabeledImages
from .in_memory import get_title
from .labels import UNLABELED, LabelSpace, OneLabel
from .options import DataOptions
from .sources import open_source
from .splits_table import get_keys


# Names of all splits -> names of the splits to read
SplitSelector = Callable[[list[str]], Collection[str]]


# Tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """The tables of a dataset, of which no label has been read.

    Attributes:
        options: of the dataset.
        name: of the file or folder, or the id on the Hub.
        title: the dataset in messages.
        folder: to which image paths are relative.
        by_split: a `datasets.Dataset` of each split.
        facts: lines about how the tables were divided.
    """

    options: DataOptions
    name: str
    title: str
    folder: Path
    by_split: Mapping[str, Any]
    facts: dict[str, str]

    def select(self, choose: SplitSelector) -> "Tables":
        """Select splits by their names; the first one trains."""
        return replace(
            self, by_split={split: self.by_split[split] for split in choose([*self.by_split])}
        )

    @property
    def image_column(self) -> str:
        """The column of images or paths. Raise ValueError if there is none, or no row."""
        options, first = self.options, next(iter(self.by_split.values()))
        return find_image_column(
            self.title, first, self.folder, options.image_column, options.label_column
        )

    def read_images(self) -> dict[str, DatasetImages]:
        """Read the images of each split; none is decoded."""
        column = self.image_column
        return {
            split: build_images(table, column, self.folder, self.title)
            for split, table in self.by_split.items()
        }

    def unlabeled(self) -> "Dataset":
        """Read the images alone: every label is missing."""
        parts = {
            split: LabeledImages(images, [None] * len(images))
            for split, images in self.read_images().items()
        }
        return Dataset(self.name, UNLABELED, parts, self.facts, title=self.title)

    def read(self) -> "Dataset":
        """Read the labels and groups of all images; a missing label is None.

        Raises:
            ValueError: if there is no column of labels, or a cell is no label.
        """
        options, image_column = self.options, self.image_column
        images = self.read_images()
        columns = find_label_columns(self.title, self.by_split, options.label_column, image_column)
        tables = drop_unlabeled_splits(self.title, self.by_split, columns)
        space, labels = read_labels(
            tables, columns, self.title, options.label_separator, options.label_names
        )
        facts = dict(self.facts)
        if columns != ["label"]:  # A class folder has no other column, and a line names its classes
            facts["labels"] = describe_labels(space, columns)

        group_column = find_group_column(tables, options.group_column, self.title)
        groups: dict[str, np.ndarray] = {}
        unused = None
        if group_column is None:
            texts = list(map(space.format, chain(*labels.values())))
            used = (image_column, FOLDER_COLUMN, options.split_column, *columns)
            names = [name for name in next(iter(tables.values())).features if name not in used]
            unused = UnusedColumns(
                tuple(table.select_columns(names) for table in tables.values()), texts
            )
            if fact := unused.find_groups(self.title):
                facts["groups"] = fact
        else:
            groups = {
                split: np.array(read_texts({split: table}, group_column, self.title), object)
                for split, table in tables.items()
            }
        parts = {
            split: LabeledImages(images[split], labels[split], groups.get(split))
            for split in tables
        }
        return Dataset(
            self.name,
            space,
            parts,
            facts,
            title=self.title,
            label_columns=tuple(columns),
            group_column=group_column,
            unused=unused,
        )


def open_tables(options: DataOptions, trained: Mapping[str, Any] | None = None) -> Tables:
    """Open `dataset`, and divide its table by a column of splits.

    Args:
        options: of the dataset.
        trained: `label_column` and `label_separator` of a model's training, which are used if the dataset
            has these columns. None: no label is read.

    Raises:
        ValueError: if the dataset cannot be read.
        OSError: if it cannot be found.
    """
    asked = options.label_column or ()
    wanted = None if trained is None else asked or trained.get("label_column") or ()
    source = open_source(options.dataset, wanted, options.group_column)
    # A run and its report may name a folder differently, and warnings are logged once
    title = resolve_name(get_title(options.dataset))
    if is_local(title):
        title = os.path.normpath(title)
    if not source.tables:
        raise ValueError(f"{title} has no splits. Add at least one, with images")

    columns = next(iter(source.tables.values())).features
    if trained and all(find_stem(columns, each) for each in trained["label_column"]):
        options = replace(options, **trained)
    tables, facts = divide_by_column(
        source.tables, title, options.split_column, options.label_column or ()
    )
    empty = [split for split, table in tables.items() if split != "train" and not len(table)]
    if 0 < len(empty) < len(tables):
        warn_on_first_process(
            f"{title}: splits without rows are left out: {format_name_list(empty)}"
        )
        tables = {split: tables[split] for split in tables if split not in empty}
    return Tables(options, source.name, title, source.folder, tables, facts)


def describe_labels(space: LabelSpace, columns: Sequence[str]) -> str:
    """Say where labels were found, with the first of each column."""
    examples = [", ".join(map(repr, names[:3])) for names in space.columns.values()]
    return (
        f"{space.description}, from {', '.join(map(repr, columns))}, such as {'; '.join(examples)}"
    )


# Datasets -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Images by split, with their labels; the training split is the first.

    Attributes:
        name: of the file or folder, or the id on the Hub.
        label_space: classes of the labels.
        images_by_split: the images.
        facts: lines about what was read: the labels, and the columns of splits and groups.
        missing_reason: why groups cannot measure one another.
        no_estimate: why a result says nothing about new photos.
        title: the dataset in messages.
        label_columns: columns of the labels.
        group_column: column of the groups.
        unused: other columns, one of which may contain groups.
        is_joined: whether these are several datasets.
    """

    name: str
    label_space: LabelSpace
    images_by_split: Mapping[str, LabeledImages]
    facts: dict[str, str] = field(default_factory=dict)
    missing_reason: str | None = None
    no_estimate: str | None = None
    title: str = ""
    label_columns: tuple[str, ...] = ()
    group_column: str | None = None
    unused: UnusedColumns | None = None
    is_joined: bool = False

    @property
    def train(self) -> LabeledImages:
        return next(iter(self.images_by_split.values()))

    def join_fitted(self) -> "Dataset":
        """Join the splits that can train a model: all but the last one, which measures it."""
        (train_split, train), *others = self.images_by_split.items()
        for _, part in others[:-1]:
            train = train.join(part)
        return replace(self, images_by_split=dict([(train_split, train), *others[-1:]]))

    def join(self, other: "Dataset") -> "Dataset":
        """Append another dataset: classes are the same by name, and groups by their value.

        Folders below a class are groups of one dataset, whatever their names are.

        Raises:
            ValueError: if a dataset has several splits, or several labels per image.
        """
        pair = (self, other)
        for each in pair:
            if len(each.images_by_split) > 1 or each.label_space.kind != OneLabel.kind:
                raise ValueError(
                    "`more_data` requires one split and one label per image in each dataset. Name a folder or "
                    "file of one split, set `label_column`, or remove `more_data`"
                )
        name, title = (
            " and ".join(getattr(each, key) for each in pair) for key in ("name", "title")
        )
        space: LabelSpace = UNLABELED
        if any(each.label_space != UNLABELED for each in pair):
            found = chain(*(chain(*each.label_space.columns.values()) for each in pair))
            space = OneLabel({"label": sort_names({*found})}, NO_SEPARATOR)
            warn_about_similar_names(title, space.names)
        mine, theirs = (each.translate(space) for each in pair)
        if mine.groups is not None or theirs.groups is not None:
            mine, theirs = (
                replace(part, groups=each.list_group_values())
                for each, part in zip(pair, (mine, theirs), strict=True)
            )
        facts = dict(self.facts)
        for key, text in other.facts.items():
            own = facts.get(key)
            facts[key] = text if own in (None, text) else f"{own}; {other.name}: {text}"
        unused = None
        if self.unused is not None and other.unused is not None:
            unused = self.unused.join(other.unused)
            if fact := unused.find_groups(title):
                facts["groups"] = fact
        return Dataset(
            name,
            space,
            {"train": mine.join(theirs)},
            facts,
            title=title,
            label_columns=("label",),
            group_column=self.group_column or other.group_column,
            unused=unused,
            is_joined=True,
        )

    def translate(self, space: LabelSpace) -> LabeledImages:
        """Number the labels of the training images by the classes of another label space."""
        names = list(chain(*self.label_space.columns.values()))
        all_names = list(chain(*space.columns.values()))
        places = [all_names.index(name) for name in names]
        labels = [None if label is None else places[label] for label in self.train.labels]
        return replace(self.train, labels=labels)

    def list_group_values(self) -> np.ndarray:
        """List the values of the training images' groups; those of folders begin with the dataset."""
        values = self.train.groups
        if values is None:
            return np.full(len(self.train), None, object)
        if self.is_joined or self.group_column != FOLDER_COLUMN:
            return values
        return np.array([value and f"{self.title}/{value}" for value in values], object)

    def answer(self, answers: pd.DataFrame, classes: Sequence[str] = ()) -> "Dataset":
        """Give photos the labels that a person gave them, whatever the dataset says.

        Args:
            answers: of `read_answers`.
            classes: further valid labels, besides those of the dataset.

        Raises:
            ValueError: if an image has several labels, or an answer is no class.
        """
        space = self.label_space
        if classes and space.kind == OneLabel.kind:
            ((column, names),) = space.columns.items()
            space = OneLabel({column: list(dict.fromkeys([*names, *classes]))}, space.separator)
        parts, lines = apply_answers(self.images_by_split, space, answers)
        return replace(
            self,
            label_space=space,
            images_by_split=parts,
            facts=self.facts | lines,
            no_estimate=lines.get(BELIEVED),
        )

    def drop_unlabeled(self) -> "Dataset":
        """Drop the images without a label, and further splits that have none at all, with a warning.

        Raises:
            ValueError: if no image has a label.
        """
        _, *others = self.images_by_split
        hidden = [
            split
            for split in others
            if all(label is None for label in self.images_by_split[split].labels)
        ]
        if hidden:
            warn_on_first_process(
                f"{self.title}: splits without labels are left out: {format_name_list(hidden)}"
            )
        parts = {
            split: drop_unlabeled_images(part, f"{self.title}, split {split!r}", self.label_columns)
            for split, part in self.images_by_split.items()
            if split not in hidden
        }
        return replace(self, images_by_split=parts)

    def identify(self) -> "Dataset":
        """Make copies of images recognizable, and number the groups.

        Copies of an image are in one group, also if they are in two splits. Several rows of one image become
        one.

        Raises:
            ValueError: if copies of an image have several labels, or all images are one group.
        """
        parts = self.images_by_split
        facts, reason = self.facts, None
        if self.group_column is not None:
            values = list(
                chain(*(part.groups for part in parts.values() if part.groups is not None))
            )
            labels = list(
                map(self.label_space.format, chain(*(part.labels for part in parts.values())))
            )
            facts = facts | {"groups": describe_groups(values, self.group_column, self.title)}
            if self.group_column != FOLDER_COLUMN:
                reason = explain_single_labels(values, labels, self.group_column)
        parts = add_keys(parts)
        check_contradictions(parts.values(), self.label_space, self.title)
        merged = {
            split: merge_rows(part, self.title, self.is_joined) for split, part in parts.items()
        }
        return replace(
            self,
            images_by_split=merged,
            facts=facts,
            missing_reason=reason,
            unused=None,  # Nothing is joined any more, and the tables may be large
        )


def read_dataset(
    options: DataOptions,
    select: SplitSelector = list,
    trained: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> Dataset:
    """Read `dataset` and `more_data`, with the labels that `answers` has.

    If there are answers, the images of a further folder have no labels unless one of its folders has the name
    of a class: they may be years.

    Args:
        options: of the dataset.
        select: chooses the splits to read. Several datasets are one split, "train".
        trained: as in `open_tables`, but {} by default.
        classes: further valid labels of answers.

    Raises:
        ValueError: if a dataset cannot be read, or has no images or labels.
        OSError: if a dataset cannot be found.
    """
    trained = trained or {}
    if not options.more_data:
        dataset = open_tables(options, trained).select(select).read()
    else:
        select(["train"])  # Raises an error if another split is wanted
        alone = replace(options, more_data=(), answers=())
        first = open_tables(alone, trained).read()
        others = []
        for name in options.more_data:
            of_other = replace(alone, dataset=name)
            if options.answers and has_other_folders(name, first.label_space):
                others.append(open_tables(of_other).unlabeled())
            else:
                others.append(open_tables(of_other, trained).read())
        dataset = reduce(Dataset.join, others, first)
    if options.answers:
        dataset = dataset.answer(read_answers(options.answers), classes)
    return dataset


def has_other_folders(name: str, space: LabelSpace) -> bool:
    """Tell whether no folder of an image folder has the name of a class."""
    path = Path(name)
    if not path.is_dir():
        return False
    folder = scan_folder(path)
    names = {normalize_name(Path(each).name) for each in folder.folders}
    return folder.is_image_folder and names.isdisjoint(map(normalize_name, space.names))


def drop_unlabeled_images(
    images: LabeledImages, name: str, columns: Sequence[str]
) -> LabeledImages:
    """Drop the images without a label, and log a warning that counts them.

    `name` names the split in messages, and `columns` have the labels. Raise ValueError if no image has a label.
    """
    labeled = [index for index, label in enumerate(images.labels) if label is not None]
    if len(labeled) == len(images):
        return images

    if not labeled:
        raise ValueError(
            f"{name}: no image has a label. Set a different `label_column`, or add labels"
        )
    is_list = isinstance(images.labels[labeled[0]], list)
    warn_on_first_process(
        f"{name}: skipped {len(images) - len(labeled):,} of {len(images):,} images (no label in "
        f"{format_name_list(columns)}{'; [] means none of the labels' if is_list else ''})"
    )
    return images.select(labeled)


# Copies and groups --------------------------------------------------------------------------------


def add_keys(splits: Mapping[str, LabeledImages]) -> dict[str, LabeledImages]:
    """Make copies recognizable: add the keys of the images, and number groups that contain all copies."""
    # Over all splits at once: a copy of a training image in the test split has the same group.
    parts = {name: get_keys(part) for name, part in splits.items()}
    _, copies = np.unique(np.concatenate(list(parts.values())), return_inverse=True)
    values = [part.groups for part in splits.values() if part.groups is not None]
    groups = (
        join_groups(copies, number_groups(np.concatenate(values).tolist())) if values else copies
    )
    ends = np.cumsum(list(map(len, parts.values())))[:-1]
    return {
        name: replace(splits[name], keys=keys, groups=part)
        for (name, keys), part in zip(parts.items(), np.split(groups, ends), strict=True)
    }


def join_groups(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Join two groupings [N], numbered from 0: images that share a group in either are together."""
    num_first = int(first.max(initial=-1)) + 1
    num_groups = num_first + int(second.max(initial=-1)) + 1
    return connect(np.stack([first, second + num_first], axis=1), num_groups)[first]


def connect(pairs: np.ndarray, number: int) -> np.ndarray:
    """Number the groups [number] of items, of which pairs [P, 2] are together."""
    graph = coo_array((np.ones(len(pairs), bool), pairs.T), shape=(number, number))
    return connected_components(graph, directed=False)[1]  # type: ignore[no-any-return]


def merge_rows(images: LabeledImages, title: str, is_joined: bool) -> LabeledImages:
    """Join the rows of one image, such as one row per annotator: each image counts once.

    A copy with another name is the same image if there are several datasets. The labels of tasks complete
    each other; `check_contradictions` has found no different ones.
    """
    rows_by_image: dict[Any, list[int]] = {}
    named = zip(
        images.images.get_names(), images.images.rows, get_keys(images).tolist(), strict=True
    )
    for index, (name, row, key) in enumerate(named):
        # An image without a file is named by its row, and known by its content.
        identity = ("" if is_joined or name == str(row) else name, key)
        rows_by_image.setdefault(index if key == NO_CONTENT_KEY else identity, []).append(index)
    if len(rows_by_image) == len(images):
        return images

    warn_on_first_process(
        f"{title}: {len(images):,} rows name {len(rows_by_image):,} images. Each image counts once"
    )
    labels = list(images.labels)
    for first, *others in rows_by_image.values():
        for other in others:
            if isinstance(labels[first], dict):
                known = {task: each for task, each in labels[other].items() if each is not None}
                labels[first] = labels[first] | known
    return replace(images, labels=labels).select(first for first, *_ in rows_by_image.values())
