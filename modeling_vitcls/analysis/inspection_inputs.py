"""Images of an inspection and, if known, their labels.

    PATHS       files, folders and URLs; a folder with the name of a class is the label of its images
    --dataset   a dataset, loaded as in scripts/evaluate.py

Images are decoded on access.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.held_out import HeldOutRecord
from ..data.images import FileImages, ImageSubset
from ..data.labels import get_label_space
from ..data.sources import load_splits
from ..data.splits import load_evaluation_data
from ..heads_vitcls import IGNORED_LABEL
from ..inference.evaluate import match_labels
from ..inference.inputs import open_image_files
from ..options import DataOptions, InspectOptions
from .inspection import spread_evenly
from .model_utils import is_classifier


@dataclass(frozen=True)
class InspectionImages:
    """Images with their names, labels (see `inspect_model`; None if unknown) and a description of their source."""

    images: Sequence[Image.Image]
    names: Sequence[str]
    labels: Sequence[Any] | None
    source: str

    def __len__(self) -> int:
        return len(self.names)

    def sample_evenly(self, count: int) -> "InspectionImages":
        """Return at most `count` evenly spaced images, because datasets are often sorted by class."""
        if len(self) <= count:
            return self
        indices = spread_evenly(list(range(len(self))), count)
        return InspectionImages(
            ImageSubset(self.images, indices),
            [self.names[index] for index in indices],
            None if self.labels is None else [self.labels[index] for index in indices],
            self.source,
        )

    def build_arguments(self, num_shown: int, num_measured: int) -> dict[str, Any]:
        """Return arguments of `inspect_model`: `num_measured` images for the statistics, of which `num_shown` are
        shown."""
        measured = self.sample_evenly(num_measured)
        return {
            "images": measured.images,
            "names": measured.names,
            "labels": measured.labels,
            "num_shown": num_shown,
        }


def open_images(options: InspectOptions, model: Any, record: HeldOutRecord | None = None) -> InspectionImages:
    """Open the images of PATHS or `--dataset`.

    Args:
        options: PATHS or `--dataset`.
        model: the model to inspect.
        record: the held-out images of the training run.

    Raises:
        ValueError: if there are no images, the dataset cannot be read, or its labels are not labels of the model.
    """
    return (
        load_from_paths(options.paths, model) if options.dataset is None else load_from_dataset(options, model, record)
    )


def load_from_paths(paths: Sequence[str], model: Any) -> InspectionImages:
    """Load image files, with labels from the names of their folders."""
    listed = open_image_files(paths)
    files = [str(content) for content in listed.contents]
    for file in files:
        if "://" not in file and not Path(file).exists():
            raise ValueError(f"Image {file} does not exist. Check the path.")
    names = [Path(name).name if "://" not in name else name for name in listed.names]
    return InspectionImages(
        FileImages(files), names, get_folder_labels(files, model), ", ".join(map(get_short_name, paths))
    )


def get_short_name(path: str) -> str:
    """Return the last component of a path; URLs are returned unchanged."""
    return path if "://" in path else Path(path).resolve().name


def get_folder_labels(files: Sequence[str], model: Any) -> list[int] | None:
    """Return the class named like the folder of each file, or IGNORED_LABEL; None if no folder is named like a
    class."""
    config = model.config
    if not is_classifier(model) or config.tasks or config.problem_type == "multi_label_classification":
        return None
    class_indices = {name: index for index, name in enumerate(get_label_space(config).names)}
    labels = [class_indices.get(Path(file).resolve().parent.name, IGNORED_LABEL) for file in files]
    return labels if any(label != IGNORED_LABEL for label in labels) else None


def load_from_dataset(options: InspectOptions, model: Any, record: HeldOutRecord | None) -> InspectionImages:
    """Load one split, with the label indices of the model, or without labels if the model has none."""
    assert options.dataset is not None
    data = DataOptions(
        options.dataset,
        image_column=options.image_column,
        label_column=options.label_column,
        label_separator=options.label_separator,
    )
    if is_classifier(model):
        label_space, examples, split, _ = load_evaluation_data(data, options.split, record)
        examples = match_labels(examples, label_space, get_label_space(model.config))
        images, labels = examples.images, examples.labels
    else:
        split = options.split or "test"
        images, labels = load_unlabeled(data, split), None
    dataset_name = get_short_name(options.dataset)
    names = [f"{dataset_name} {index}" for index in range(len(images))]
    return InspectionImages(images, names, labels, f"{dataset_name}, split {split}")


def load_unlabeled(data: DataOptions, split: str) -> Sequence[Image.Image]:
    """Load the images of a split, or of the only split of a dataset."""

    def select_split(names: list[str]) -> list[str]:
        if split not in names and len(names) > 1:
            raise ValueError(f"{data.dataset} has no split {split!r}. Choose one of {', '.join(names)}.")
        return [split if split in names else names[0]]

    (examples,) = load_splits(data, use_labels=False, select=select_split).parts.values()
    return examples.images
