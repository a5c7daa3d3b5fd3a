"""The images that evaluation reads: all of a split, except those that trained the model."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .answers import CONTRADICTED
from .images import LabeledImages
from .in_memory import get_title
from .labels import LabelSpace
from .options import DataOptions
from .sources import choose_split, drop_unlabeled_images, load_splits
from .splits import HELD_OUT_SPLITS, add_keys, check_contradictions, merge_rows, select_counted
from .splits_table import EMPTY_TABLE, find_trained_images


MAX_MISSING = 100  # More unreadable images end every command
# Splits that `vitcls evaluate` reads, in order of precedence.
EVALUATION_SPLITS = ("test", *HELD_OUT_SPLITS[:-1])


class EvaluationData(NamedTuple):
    """Images and labels for the evaluation of a model."""

    label_space: LabelSpace
    images: LabeledImages
    split: str
    num_trained: int  # Number of images that trained the model: left out, unless a split is named
    description: str  # Says which images these are
    dataset: str = ""  # Names of all datasets
    # Images that show none of the classes, as a person has answered, of those that are counted
    outside: LabeledImages | None = None
    num_uncounted: int = 0  # Number of images that a model was unsure about: left out
    no_estimate: str | None = None  # Why the result says nothing about new photos


def load_evaluation_data(
    options: DataOptions,
    split: str | None,
    splits: pd.DataFrame = EMPTY_TABLE,
    use_labels: bool = True,
    max_images: int | None = None,
    trained: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> EvaluationData:
    """Load the images to evaluate, without those that trained the model.

    Args:
        options: the dataset.
        split: the split, of which all images are evaluated. None: `test`, else `validation`, else
            the only split.
        splits: the rows of splits.parquet about the model.
        use_labels: whether labels are read. If False, every label is missing.
        max_images: number of images to draw at random.
        trained: label columns of the model's training, which are read if the dataset has them.
        classes: the model's, which are valid in `answers`.

    Raises:
        ValueError: if the split does not exist, or if training used all of its images.
    """
    names: list[str] = []

    def choose(found: list[str]) -> list[str]:
        names.extend(found)
        return [choose_split(split, get_title(options.dataset), found, EVALUATION_SPLITS)]

    has_answers = bool(options.answers)
    loaded = load_splits(options, use_labels, choose, trained, has_answers, classes)
    ((name, images),) = loaded.images_by_split.items()
    dataset = loaded.name
    outside = None
    if images.chosen is not None:
        outside = select_outside(images)
        images = drop_unlabeled_images(images, dataset, ["label"])
    if use_labels:
        images = add_keys({name: images})[name]
        check_contradictions([images], loaded.label_space, dataset)
        images = merge_rows(images, options)
    is_trained = find_trained_images(images, splits)
    num_trained = int(is_trained.sum())

    # A folder of test photos is no split, and must not be called "train".
    description = f"all {len(images):,} images"
    if len(names) > 1:
        description += f" of split {name!r}"
    if num_trained and split is not None:  # All its images count
        description += f", of which training used {num_trained:,}"
    elif are_missing(images, np.flatnonzero(~is_trained)):
        others = " that are there" if num_trained < len(images) else ""
        raise ValueError(
            f"the model was trained on all {num_trained:,} images of {dataset}{others}. Its own "
            f"result is in its results.json. Set `dataset` to other "
            f"images, or `split={name!r}` to evaluate these"
        )
    elif num_trained:
        images, _ = images.divide(is_trained)
        description += f" without the {num_trained:,} that trained the model"

    num_uncounted = int((~images.is_counted).sum())
    if num_uncounted:
        images = select_counted(images, dataset)
        description += f", without the {num_uncounted:,} that a model was unsure about"
    drawn = images.draw(max_images)
    if len(drawn) < len(images):
        description = f"drawn at random from {description}"
    if text := loaded.facts.get("answers"):
        description += f"; answers: {text}"
    return EvaluationData(
        loaded.label_space,
        drawn,
        name,
        num_trained,
        description,
        dataset,
        outside=outside,
        num_uncounted=num_uncounted,
        # An answer about other photos changes none of these labels
        no_estimate=loaded.no_estimate if has_contradicted(images) else None,
    )


def are_missing(images: LabeledImages, indices: np.ndarray) -> bool:
    """Tell whether there are no images at the indices [N], or only files that do not exist."""
    if len(indices) > MAX_MISSING:
        return False
    encoded = [images.images.get_encoded_image(index) for index in indices]
    paths = [each["path"] or "" for each in encoded if each["bytes"] is None]
    # A file in an archive has an address
    return len(paths) == len(indices) and not any(
        "://" in path or os.path.lexists(path) for path in paths
    )


def select_outside(images: LabeledImages) -> LabeledImages:
    """Select the answered images that show none of the classes, of those that are counted.

    A page that asks about unknown photos would measure its own choice.
    """
    is_outside = np.array([label is None for label in images.labels], bool)
    return images.select(np.flatnonzero(is_outside & images.is_counted & (images.chosen != "")))


def has_contradicted(images: LabeledImages) -> bool:
    """Check whether a person has answered about an image because a classifier contradicted its label."""
    return images.chosen is not None and bool((images.chosen == CONTRADICTED).any())
