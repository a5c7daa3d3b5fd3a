"""Which images a run trains on, and which it holds out.

    --dataset -> load_undivided_images -> Dataset -> the run decides what it is (training/plan.py)
                                                  -> scenes become groups, if a frozen encoder finds any
                                                  -> divide_images -> TrainingData

If a dataset has no evaluation split, each image gets a random number, which depends on the seed and
on its content. The images with the smallest numbers are held out: the given fraction of each class,
and at least one of two. Copies of an image, and images of one group, are on the same side.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..hub.model_folder import ModelFolder
from ..runtime.errors import format_name_list, warn_on_first_process
from .dataset import Dataset, read_dataset
from .image_folder import explain_layout, scan_folder
from .images import LabeledImages
from .in_memory import get_title
from .labels import LabelSpace, SeveralLabels
from .options import DataOptions, read_data_options
from .sampling import draw_numbers
from .splits_table import (
    find_trained_images,
    get_keys,
    read_splits,
    select_task,
)


# Names of held-out splits, in order of precedence.
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")
MIN_CLASS_SIZE = 5  # Smaller classes are named, if others are larger

SINGLE_GROUPS = "each class has a single image (or copies or a group of one)"

# Ratio of the largest to the smallest class, above which balanced metrics are printed, too
MAX_CLASS_RATIO = 3


# Training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """Training images and held-out images of a run."""

    name: str
    label_space: LabelSpace
    train: LabeledImages
    held_out: LabeledImages
    held_out_split: str | None  # None if the held-out images were drawn from the only split
    held_out_name: str  # Description of the held-out images
    train_indices: np.ndarray  # Places of the training images among the undivided ones
    held_out_indices: np.ndarray  # Places of the held-out images; -1 if they are a split
    selection: LabeledImages | None  # Images of a validation split beside a test split
    no_estimate: str | None = None  # Why the result says nothing about new photos

    def build_counted_record(self) -> dict[str, Any]:
        """Build the fields of results.json about answers: what is only trained on, and who believed the model."""
        return build_counted_record(self.train, self.no_estimate)

    @property
    def is_shared(self) -> np.ndarray:
        """Whether held-out images [N] are copies or of groups of training images, in a dataset's splits."""
        assert self.train.groups is not None, "`add_keys` sets the groups"
        assert self.held_out.groups is not None, "`add_keys` sets the groups"
        return np.isin(self.held_out.groups, self.train.groups)

    def count_seen(self, encoder_rows: pd.DataFrame, is_frozen: bool = True) -> int:
        """Count the images that measure the model, although they trained it, or its encoder earlier."""
        # Cross-validation measures a frozen run on all images that it is fitted to.
        if is_frozen and not len(self.held_out):
            return int(find_trained_images(self.train, encoder_rows).sum())
        return int((find_trained_images(self.held_out, encoder_rows) | self.is_shared).sum())


def divide_images(
    images: Dataset,
    held_out_fraction: float,
    groups: Sequence[int] | np.ndarray | None = None,
) -> TrainingData:
    """Choose the images that train, calibrate and measure a model.

    If there are two splits for evaluation, the first calibrates the model, and the second measures it.
    If there are fewer, images are held out from the training images. Images that are not counted
    neither calibrate nor measure: they are used for training, unless an image of their group is held out.

    Args:
        held_out_fraction: part of the training images to hold out if no split is for
            evaluation.
        groups: [N] of the training images, if photos of a scene were joined to the groups of the dataset.

    Raises:
        ValueError: if there are too few images.
    """
    train, *others = images.images_by_split.values()
    _, *names = images.images_by_split
    reason = SINGLE_GROUPS
    if groups is not None:
        train = replace(train, groups=np.asarray(groups))
        reason = "the photos of each class are shots of one scene"
    train_indices = np.arange(len(train))
    selection = None
    others = [
        select_counted(part, f"{images.name}, split {name!r}")
        for name, part in zip(names, others, strict=True)
    ]
    if len(others) == 2:
        selection = others.pop(0)
    if others:
        (held_out,) = others
        held_out_indices = np.full(len(held_out), -1)
        held_out_name = f"split {names[-1]!r}"
    else:
        held_out_name = f"about {held_out_fraction:.0%}"
        if train.is_stratified:
            held_out_name += ", stratified by class"
        is_held_out = select_held_out(train, held_out_fraction, 0, images.name, reason)
        train_indices = np.flatnonzero(~is_held_out)
        held_out_indices = np.flatnonzero(is_held_out & train.is_counted)
        train, held_out = train.select(train_indices), train.select(held_out_indices)
    return TrainingData(
        name=images.name,
        label_space=images.label_space,
        train=train,
        held_out=held_out,
        held_out_split=names[-1] if names else None,
        held_out_name=held_out_name,
        train_indices=train_indices,
        held_out_indices=held_out_indices,
        selection=selection,
        no_estimate=images.no_estimate,
    )


def build_counted_record(images: LabeledImages, no_estimate: str | None) -> dict[str, Any]:
    """Build the fields of a result about answers.

    Args:
        images: of which those that are not counted are only trained on.
        no_estimate: why the result says nothing about new photos.
    """
    return {"num_uncounted": int((~images.is_counted).sum()), "no_estimate": no_estimate}


def select_counted(images: LabeledImages, name: str) -> LabeledImages:
    """Select the images that measure a model. Raise ValueError if there are none; `name` is theirs."""
    if images.is_counted.all():
        return images
    counted = images.select(np.flatnonzero(images.is_counted))
    if not len(counted):
        raise ValueError(
            f"{name}: no image measures a model, because a page has asked about all of them when a model was "
            "unsure. Add other images, or answers about photos drawn at random"
        )
    return counted


def load_undivided_images(
    options: DataOptions, reads_all: bool = False, min_classes: int = 2
) -> Dataset:
    """Read the labels and the keys of the images of a dataset, by split. No image is decoded.

    Args:
        reads_all: whether the test split, whose labels may be hidden, is read as well if there is
            a validation split.
        min_classes: number of classes that each label column needs.

    Raises:
        ValueError: if the dataset has no images, no labels, too few classes, or an image with two
            labels.
    """
    loaded = read_dataset(options, partial(choose_training_splits, reads_all)).drop_unlabeled()
    labels = loaded.label_space
    title = get_title(options.dataset)
    if isinstance(labels, SeveralLabels):
        counts = Counter(chain.from_iterable(loaded.train.labels))
        if set(counts.values()) <= {len(loaded.train)}:
            raise ValueError(
                f"all images of {title} have the same labels ({format_name_list(labels.names)}), so "
                "there is nothing to learn. Add images with other labels, or `[]` for none of them"
            )
    else:
        for column, names in labels.columns.items():
            if len(names) < min_classes:
                found = f"the single class {names[0]!r}" if names else "no labels"
                remedy = "Add images of another class"
                path = Path(options.dataset)
                if path.is_dir() and (folder := scan_folder(path)).is_image_folder:
                    remedy = explain_layout(folder)
                raise ValueError(
                    f"a classifier requires two or more classes, but {title} has {found} in "
                    f"{column!r}. {remedy}"
                )
    return loaded.identify()


def load_run_data(folder: ModelFolder, dataset: str) -> TrainingData:
    """Read the images and labels of a finished run again, and divide them as the run did.

    Args:
        folder: its folder.
        dataset: where the dataset is now.

    Raises:
        ValueError, OSError: if the dataset cannot be read.
    """
    flags = folder.flags
    results = folder.results_of_any_weights
    options = read_data_options(flags | {"dataset": dataset})
    images = load_undivided_images(
        options,
        # A test split that the run did not read may have come since.
        reads_all=results.get("held_out_split") == "test",
    )
    splits = select_task(read_splits(folder), None)
    held_out_keys = splits["key"][splits["split"] == "test"]
    # As drawn, if the table was removed
    data = divide_images(
        images, 0.0 if len(held_out_keys) else flags.get("held_out_fraction") or 0.0
    )
    if len(data.held_out):
        return data
    train, held_out = data.train.divide(np.isin(get_keys(data.train), held_out_keys))
    return replace(data, train=train, held_out=held_out)


def choose_training_splits(reads_all: bool, names: Collection[str]) -> list[str]:
    """Choose the training split, and the splits for evaluation: validation before test.

    The test split is read if there is no other, or with `reads_all`.
    """
    train = "train" if "train" in names else next(iter(names))
    others = [name for name in HELD_OUT_SPLITS if name in names and name != train]
    if unread := [name for name in names if name not in (train, *HELD_OUT_SPLITS)]:
        warn_on_first_process(
            f"splits that are not read: {format_name_list(unread)}. To use them, name them train, validation or test"
        )
    # The first of them selects a checkpoint, and the test split measures it.
    if reads_all and "test" in others[1:]:
        return [train, others[0], "test"]
    return [train, *others[:1]]


# Held-out images ----------------------------------------------------------------------------------


def check_can_divide(images: Dataset, held_out_fraction: float) -> None:
    """Raise ValueError if no images could be held out."""
    if held_out_fraction and len(images.images_by_split) == 1:
        check_can_hold_out(images.train, images.name)


def check_can_hold_out(images: LabeledImages, dataset: str, reason: str = SINGLE_GROUPS) -> None:
    """Raise ValueError unless a class has two groups: one to train, and one to hold out."""
    table = pd.DataFrame({"group": images.groups, "label": 0, "is_counted": images.is_counted})
    if images.is_stratified:
        table["label"] = images.labels
    if not table["is_counted"].any():
        reason = "a page has asked about all of them when a model was unsure"
    units = table.groupby("group").agg({"label": "first", "is_counted": "any"})
    classes = units.groupby("label")["is_counted"].agg(["size", "sum"])
    if not ((classes["size"] > 1) & (classes["sum"] > 0)).any():
        raise ValueError(
            f"{dataset}: no image can be held out, because {reason}. Add images, choose a different "
            "`label_column`, or set `held_out_fraction=0` to train on all images"
        )


def select_held_out(
    images: LabeledImages, fraction: float, seed: int, dataset: str, reason: str
) -> np.ndarray:
    """Choose the held-out images, a fraction of those of each class that are counted: a mask [N].

    The units are the groups of the images, so images that are not counted may be in one. Raise
    ValueError, with the `reason`, if none of the images would be held out.
    """
    assert images.groups is not None, "`add_keys` comes before the division"
    if not fraction:
        return np.zeros(len(images), bool)
    check_can_hold_out(images, dataset, reason)

    _, first, group = np.unique(images.groups, return_index=True, return_inverse=True)
    # Groups without counted images are trained on
    sizes = np.bincount(group, weights=images.is_counted)
    keys = np.full(len(sizes), np.iinfo(np.uint64).max, np.uint64)
    # A group has the smallest key of its images: neither their order nor their names matter. The smallest
    # number would hold out large groups more often.
    np.minimum.at(keys, group, get_keys(images))
    numbers = draw_numbers(keys, seed)
    labels = np.array(images.labels)[first] if images.is_stratified else np.zeros(len(first), int)

    is_held_out = np.zeros(len(sizes), bool)  # One value per group
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(numbers[members], kind="stable")]
        can_measure = sizes[members] > 0
        if len(members) > 1 and can_measure.any():
            num_missing = fraction * sizes[members].sum()
            # At least one group of each class is not held out, and at least one is.
            number = len(members) - 1 if can_measure.all() else len(members)
            members = members[can_measure]
            for member in members[:number]:
                # More than half of a group must be missing, so a smaller one may follow a large one.
                if sizes[member] <= 2 * num_missing:
                    is_held_out[member] = True
                    num_missing -= sizes[member]
            if not is_held_out[members].any():
                is_held_out[members[sizes[members].argmin()]] = True
    return is_held_out[group]  # type: ignore[no-any-return]


# Changes of the data ------------------------------------------------------------------------------


def hash_data(images: Dataset) -> dict[str, Any]:
    """Hash the images of a run for checkpoints, so a resumed run can detect a change."""
    description: dict[str, Any] = {"classes": images.label_space.columns}
    for split, part in images.images_by_split.items():
        content = get_keys(part).tobytes() + json.dumps(part.labels).encode()
        description[f"{split} images"] = hashlib.sha256(content).hexdigest()
    return description


def describe_leaks(training_data: TrainingData, group_column: str | None) -> list[str]:
    """List what makes a result too good: copies and groups on both sides of the dataset's splits.

    Drawn held-out images have groups of their own.
    """
    held_out, is_shared = training_data.held_out, training_data.is_shared
    if not is_shared.any():
        return []
    example = held_out.images.get_names()[is_shared.argmax()]
    relation = "copies of" if group_column is None else f"in one group ({group_column}) with"
    return [
        f"{is_shared.sum():,} of the {len(held_out):,} held-out images are {relation} training images "
        f"({example}), so the result is better than for new images, and has no interval. Remove them from one "
        "of the splits"
    ]


def describe_missing_classes(training_data: TrainingData) -> list[str]:
    """List classes that no image trains or measures: one side of the split lacks them.

    With several labels per image, they are on all training images, on one or on none.
    """
    parts = (training_data.train, training_data.held_out)
    if isinstance(training_data.label_space, SeveralLabels):
        return describe_constant_labels(training_data.train, training_data.label_space.names)
    if not all(images.is_stratified for images in parts if len(images)):
        return []
    names = training_data.label_space.names
    train, held_out = (Counter(names[label] for label in part.labels) for part in parts)
    counts = train + held_out
    small = sorted(name for name, count in counts.items() if count < MIN_CLASS_SIZE)
    lines = []
    if unused := [name for name in names if name not in counts]:
        lines.append(
            f"no image is of {format_name_list(unused)}, so the model will never predict these classes. "
            "Add images, or declare only the classes that have some"
        )
    if small and max(counts.values()) > MAX_CLASS_RATIO * MIN_CLASS_SIZE:
        lines.append(
            f"{len(small)} of the {len(counts)} classes have fewer than {MIN_CLASS_SIZE} images, so few of "
            f"their photos will be recognized: {format_name_list(small)}. Add images (10 or 20 help much), "
            "or leave these classes out"
        )
    if not len(training_data.held_out):
        single = sorted(name for name, count in counts.items() if count == 1)
        if single:
            lines.append(
                f"no result measures classes with one image: {format_name_list(single)}. Add images"
            )
        return lines

    kinds = {
        "training": sorted(held_out.keys() - train.keys()),
        "held-out": sorted(train.keys() - held_out.keys()),
    }
    return lines + [
        f"{len(missing)} of the {len(counts)} classes have no {kind} images: "
        f"{format_name_list(missing)}"
        for kind, missing in kinds.items()
        if missing
    ]


def describe_divided_groups(training_data: TrainingData) -> list[str]:
    """Name the classes whose only group also has images of other classes: no fold can leave it out."""
    train = training_data.train
    if len(training_data.held_out) or not train.is_stratified:
        return []
    table = pd.DataFrame({"group": train.groups, "label": train.labels})
    num_groups = table.groupby("label")["group"].transform("nunique")
    num_labels = table.groupby("group")["label"].transform("nunique")
    labels = table["label"][(num_groups == 1) & (num_labels > 1)].unique()
    if not len(labels):
        return []
    names = format_name_list([training_data.label_space.names[label] for label in labels])
    return [
        f"all images of {names} are in one group with images of other classes, so cross-validation divides "
        "this group. Add images in another group"
    ]


def describe_constant_labels(images: LabeledImages, names: Sequence[str]) -> list[str]:
    """List labels that almost all images have, or almost none: they cannot be learned."""
    counts = Counter(chain.from_iterable(images.labels))
    found = [name for label, name in enumerate(names) if not 1 < counts[label] < len(images) - 1]
    if not found:
        return []
    return [
        f"{len(found):,} of the {len(names):,} labels are on at most one training image, or on all "
        "but at most one, so they cannot be learned, and their probability is their share of the "
        f"images: {format_name_list(found)}. Add other images, or remove these labels"
    ]
