"""Images and labels of `vitcls inspect`, decoded on access.

PATHS       files and folders; if a folder has the name of a class, its images have this label
--dataset   a dataset, loaded as in `vitcls evaluate`
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.cells import normalize_name
from ..data.evaluation_data import load_evaluation_data
from ..data.images import DatasetImages
from ..data.label_matching import translate_labels
from ..data.labels import UNLABELED, LabelSpace, OneLabel
from ..data.options import DataOptions
from ..data.splits_table import EMPTY_TABLE
from ..inference.inputs import list_records
from .options import InspectOptions


@dataclass(frozen=True)
class InspectionImages:
    """Images with names, labels (as in `inspect_model`), and a description of the source."""

    images: DatasetImages
    names: Sequence[str]
    labels: Sequence[Any] | None  # None if unknown
    source: str

    def draw(self, num_images: int) -> "InspectionImages":
        """Draw at most `num_images` images at random, in the same order."""
        drawn = np.random.default_rng(0).permutation(len(self.names))[:num_images]
        indices = np.sort(drawn).tolist()
        return replace(
            self,
            images=self.images.select(indices),
            names=[self.names[index] for index in indices],
            labels=None if self.labels is None else [self.labels[index] for index in indices],
        )


def open_images(
    options: InspectOptions, label_space: LabelSpace, splits: pd.DataFrame = EMPTY_TABLE
) -> InspectionImages:
    """Open the images of `paths` or `dataset`, with the label indices of a classifier.

    `label_space` belongs to the classifier, or is UNLABELED. `splits` are the rows of
    splits.parquet about the model.

    Raises:
        ValueError: if there are no images, the dataset cannot be read, or its labels do not match
            the model.
    """
    if options.dataset is None:
        return open_paths(options.paths, label_space)

    data_options = DataOptions(
        dataset=options.dataset,
        image_column=options.image_column,
        label_column=options.label_column,
        label_separator=options.label_separator,
    )
    use_labels = label_space != UNLABELED
    data = load_evaluation_data(data_options, options.split, splits, use_labels=use_labels)
    labels: Sequence[Any] | None = None
    if use_labels:
        labels = translate_labels(data.images, data.label_space, label_space).labels

    images = data.images.images
    dataset_name = Path(options.dataset).resolve().name
    # Numbers of rows do not say which dataset they are from.
    names = [f"{dataset_name} {name}" if name.isdigit() else name for name in images.get_names()]
    return InspectionImages(images, names, labels, f"{dataset_name}, {data.description}")


def open_paths(paths: Sequence[str], label_space: LabelSpace) -> InspectionImages:
    """Open image files and folders.

    The class of each image is the name of its folder; without a class of this name, it has
    no label. There are no labels if no folder has the name of a class, or images do not have
    exactly one class.
    """
    records = list_records(paths)
    files = [str(record.content) for record in records]

    names = [Path(record.name).name for record in records]
    class_names: list[str] = []
    if label_space != UNLABELED and isinstance(label_space, OneLabel):
        class_names = label_space.names
    indices = {normalize_name(name): index for index, name in enumerate(class_names)}
    labels = [indices.get(normalize_name(Path(file).resolve().parent.name)) for file in files]
    has_labels = any(label is not None for label in labels)
    source = ", ".join(Path(path).resolve().name for path in paths)
    images = DatasetImages.from_list(files)
    return InspectionImages(images, names, labels if has_labels else None, source)
