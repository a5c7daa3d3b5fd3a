"""Images of an inspection and, if known, their labels. Images are decoded on access.

PATHS       files, folders and URLs; if a folder has the name of a class, the images in the folder have this label
--dataset   a dataset, loaded as in `vitcls evaluate`
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.held_out import HeldOutRecord
from ..data.images import ArrayImages, DatasetImages
from ..data.labels import get_label_space
from ..data.sources import load_splits
from ..data.splits import load_evaluation_data
from ..heads_vitcls import IGNORED_LABEL
from ..inference.evaluate import match_labels
from ..inference.inputs import build_list_input
from ..options import DataOptions, InspectOptions
from .inspection import select_evenly_spaced
from .model_utils import is_classifier


@dataclass(frozen=True)
class InspectionImages:
    """Images with names, labels (as in `inspect_model`; None if unknown) and a description of the source."""

    images: ArrayImages | DatasetImages | list[Image.Image]
    names: Sequence[str]
    labels: Sequence[Any] | None
    source: str

    def build_arguments(self, num_shown: int, num_measured: int) -> dict[str, Any]:
        """Return arguments of `inspect_model`: `num_measured` images for the statistics, of which `num_shown` are
        shown. The images are evenly spaced, because datasets are often sorted by class."""
        indices = select_evenly_spaced(range(len(self.names)), num_measured)
        if isinstance(self.images, list):
            images: Any = [self.images[index] for index in indices]
        else:
            images = self.images.select(indices)
        return {
            "images": images,
            "names": [self.names[index] for index in indices],
            "labels": None if self.labels is None else [self.labels[index] for index in indices],
            "num_shown": num_shown,
        }


def open_images(options: InspectOptions, model: Any, record: HeldOutRecord | None = None) -> InspectionImages:
    """Open the images of PATHS or `--dataset`. `record` is the held-out record of the model's training run.

    Raises:
        ValueError: if there are no images, the dataset cannot be read, or its labels do not match the model.
    """
    if options.dataset is None:
        return load_from_paths(options.paths, model)
    return load_from_dataset(options, options.dataset, model, record)


def load_from_paths(paths: Sequence[str], model: Any) -> InspectionImages:
    """Load image files, and derive labels from the folder names."""
    list_input = build_list_input(paths)
    files = [str(content) for content in list_input.contents]
    for file in files:
        if "://" not in file and not Path(file).exists():
            raise ValueError(f"Image {file} does not exist. Check the path.")
    names = [name if "://" in name else Path(name).name for name in list_input.names]
    source = ", ".join(map(get_short_name, paths))
    return InspectionImages(DatasetImages.from_list(files), names, get_folder_labels(files, model), source)


def get_short_name(path: str) -> str:
    """Return the last component of a path; URLs are returned unchanged."""
    return path if "://" in path else Path(path).resolve().name


def get_folder_labels(files: Sequence[str], model: Any) -> list[int] | None:
    """Return the class index of each file: the index of the class with the same name as the file's folder, or
    IGNORED_LABEL if there is no such class. Return None if no folder has the name of a class."""
    config = model.config
    if not is_classifier(model) or config.tasks or config.problem_type == "multi_label_classification":
        return None
    class_indices = {name: index for index, name in enumerate(get_label_space(config).names)}
    labels = [class_indices.get(Path(file).resolve().parent.name, IGNORED_LABEL) for file in files]
    return labels if any(label != IGNORED_LABEL for label in labels) else None


def load_from_dataset(
    options: InspectOptions, dataset: str, model: Any, record: HeldOutRecord | None
) -> InspectionImages:
    """Load one split, with the label indices of the model, or without labels if the model is not a classifier."""
    column_options = {name: getattr(options, name) for name in ("image_column", "label_column", "label_separator")}
    data_options = DataOptions(dataset, **column_options)
    if is_classifier(model):
        label_space, examples, split, _ = load_evaluation_data(data_options, options.split, record)
        examples = match_labels(examples, label_space, get_label_space(model.config))
        images, labels = examples.images, examples.labels
    else:
        images, split = load_unlabeled_images(data_options, options.split or "test")
        labels = None
    dataset_name = get_short_name(dataset)
    names = [f"{dataset_name} {index}" for index in range(len(images))]
    return InspectionImages(images, names, labels, f"{dataset_name}, split {split}")


def load_unlabeled_images(data_options: DataOptions, split: str) -> tuple[Sequence[Image.Image], str]:
    """Return the images of a split and the name of the split. If the dataset has only one split, return this split."""

    def select_split(names: list[str]) -> list[str]:
        if split not in names and len(names) > 1:
            raise ValueError(f"{data_options.dataset} has no split {split!r}. Choose one of {', '.join(names)}.")
        return [split if split in names else names[0]]

    ((name, examples),) = load_splits(data_options, use_labels=False, select=select_split).images_by_split.items()
    return examples.images, name
