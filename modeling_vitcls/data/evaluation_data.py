"""The images that evaluation reads: all of a split, except those that trained the model."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from .answers import CONTRADICTED
from .dataset import Dataset, drop_unlabeled_images, open_tables, read_dataset
from .images import LabeledImages
from .in_memory import get_title
from .labels import LabelSpace
from .options import DataOptions
from .sources import choose_split
from .splits import HELD_OUT_SPLITS, select_counted
from .splits_table import EMPTY_TABLE, find_trained_images


MAX_MISSING = 100  # More unreadable images end every command
# Splits that `vitcls evaluate` reads, in order of precedence.
EVALUATION_SPLITS = ("test", *HELD_OUT_SPLITS[:-1])


@dataclass(frozen=True)
class EvaluationData:
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

    def leave_out_trained(self, splits: pd.DataFrame, is_named: bool) -> "EvaluationData":
        """Leave out the images that trained the model; if a split is named, all of its images count.

        Raise ValueError if none is left.
        """
        is_trained = find_trained_images(self.images, splits)
        number = int(is_trained.sum())
        data = replace(self, num_trained=number)
        if number and is_named:
            return replace(
                data, description=f"{self.description}, of which training used {number:,}"
            )
        if are_missing(self.images, np.flatnonzero(~is_trained)):
            others = " that are there" if number < len(self.images) else ""
            raise ValueError(
                f"the model was trained on all {number:,} images of {self.dataset}{others}. Its own "
                f"result is in its results.json. Set `dataset` to other "
                f"images, or `split={self.split!r}` to evaluate these"
            )
        if not number:
            return data
        images, _ = self.images.divide(is_trained)
        text = f"{self.description} without the {number:,} that trained the model"
        return replace(data, images=images, description=text)

    def leave_out_uncounted(self) -> "EvaluationData":
        """Leave out the images that a model was unsure about. Raise ValueError if none is left."""
        number = int((~self.images.is_counted).sum())
        if not number:
            return self
        return replace(
            self,
            images=select_counted(self.images, self.dataset),
            num_uncounted=number,
            description=f"{self.description}, without the {number:,} that a model was unsure about",
        )

    def draw(self, max_images: int | None) -> "EvaluationData":
        """Draw at most `max_images` at random."""
        drawn = self.images.draw(max_images)
        if len(drawn) == len(self.images):
            return self
        return replace(self, images=drawn, description=f"drawn at random from {self.description}")


@dataclass(frozen=True)
class Trained:
    """What a model was trained on.

    Attributes:
        splits: the rows of splits.parquet about the model.
        columns: its `label_column` and `label_separator`, which are read if the dataset has them.
        classes: of the model, which are valid in `answers`.
    """

    splits: pd.DataFrame = field(default_factory=lambda: EMPTY_TABLE)
    columns: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()


def load_evaluation_data(
    options: DataOptions,
    split: str | None,
    trained: Trained | None = None,
    max_images: int | None = None,
) -> EvaluationData:
    """Load the images to evaluate, without those that trained the model.

    Args:
        options: the dataset.
        split: the split, of which all images are evaluated. None: `test`, else `validation`, else
            the only split.
        trained: what the model was trained on.
        max_images: number of images to draw at random.

    Raises:
        ValueError: if the split does not exist, or if training used all of its images.
    """
    trained = trained or Trained()
    names: list[str] = []

    def choose(found: list[str]) -> list[str]:
        names.extend(found)
        return [choose_split(split, get_title(options.dataset), found, EVALUATION_SPLITS)]

    dataset = read_dataset(options, choose, trained.columns, trained.classes)
    outside = None
    if options.answers:
        outside = select_outside(dataset.train)
        (name,) = dataset.images_by_split
        labeled = drop_unlabeled_images(dataset.train, dataset.name, ["label"])
        dataset = replace(dataset, images_by_split={name: labeled})
    else:
        dataset = dataset.drop_unlabeled()
    dataset = dataset.identify()

    data = describe_split(dataset, names).leave_out_trained(trained.splits, split is not None)
    data = data.leave_out_uncounted()
    # An answer about other photos changes none of these labels
    no_estimate = dataset.no_estimate if has_contradicted(data.images) else None
    data = data.draw(max_images)
    if text := dataset.facts.get("answers"):
        data = replace(data, description=f"{data.description}; answers: {text}")
    return replace(data, outside=outside, no_estimate=no_estimate)


def load_photographs(
    options: DataOptions, split: str | None, max_images: int | None = None
) -> EvaluationData:
    """Load the images of a split without their labels.

    Raises:
        ValueError: if the split does not exist.
    """
    tables = open_tables(options)
    names = list(tables.by_split)
    chosen = choose_split(split, get_title(options.dataset), names, EVALUATION_SPLITS)
    dataset = tables.select(lambda _: [chosen]).unlabeled()
    return describe_split(dataset, names).draw(max_images)


def describe_split(dataset: Dataset, names: Sequence[str]) -> EvaluationData:
    """Describe the only split that was read of a dataset with splits of these names."""
    ((split, images),) = dataset.images_by_split.items()
    # A folder of test photos is no split, and must not be called "train".
    description = f"all {len(images):,} images"
    if len(names) > 1:
        description += f" of split {split!r}"
    return EvaluationData(dataset.label_space, images, split, 0, description, dataset=dataset.name)


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

    Photos that were shown because they look unknown were chosen by what they would measure.
    """
    is_outside = np.array([label is None for label in images.labels], bool)
    return images.select(np.flatnonzero(is_outside & images.is_counted & (images.chosen != "")))


def has_contradicted(images: LabeledImages) -> bool:
    """Check whether a person has answered about an image because a classifier contradicted its label."""
    return images.chosen is not None and bool((images.chosen == CONTRADICTED).any())
