"""The images of an inspection and, where they are known, their labels.

    PATHS       files, folders and URLs; a folder that is called like one of the model's classes says what is in it
    --dataset   as scripts/evaluate.py reads it

Nothing is decoded before it is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.held_out import HeldOutRecord
from ..data.images import Chosen, Files
from ..data.labels import labels_of
from ..data.sources import load_splits
from ..data.splits import load_evaluation_data
from ..heads_vitcls import IGNORED_LABEL
from ..inference.evaluate import relabelled
from ..inference.inputs import listed_files
from ..options import DataOptions, InspectOptions
from .model_utils import is_classifier


@dataclass(frozen=True)
class Images:
    """Pictures by place, what to call them, and their labels (see `inspect_model`), or None."""

    pictures: Sequence[Image.Image]
    names: Sequence[str]
    labels: Sequence[Any] | None
    source: str

    def __len__(self) -> int:
        return len(self.names)

    def spread(self, count: int) -> "Images":
        """At most `count` of them, evenly over all: classes often follow each other."""
        if len(self) <= count:
            return self
        chosen = [(2 * number + 1) * len(self) // (2 * count) for number in range(count)]
        return Images(
            Chosen(self.pictures, chosen),
            [self.names[place] for place in chosen],
            None if self.labels is None else [self.labels[place] for place in chosen],
            self.source,
        )

    def to_inspect(self, num_shown: int, num_measured: int) -> dict[str, Any]:
        """What `inspect_model` takes of them: some to show, and more for the statistics."""
        shown, measured = self.spread(num_shown), self.spread(num_measured)
        return {
            "pictures": shown.pictures,
            "names": shown.names,
            "labels": shown.labels,
            "statistics_pictures": measured.pictures,
            "statistics_labels": measured.labels,
        }


def open_images(options: InspectOptions, model: Any, record: HeldOutRecord | None = None) -> Images:
    """What PATHS or `--dataset` name.

    Args:
        options: PATHS or `--dataset`.
        model: the model to inspect.
        record: the held-out images of the run that made the model.

    Raises:
        ValueError: for an input without images, a data set that cannot be read, or labels that are not the model's.
    """
    return from_paths(options.paths, model) if options.dataset is None else from_dataset(options, model, record)


def from_paths(paths: Sequence[str], model: Any) -> Images:
    """Files with the labels that their folders say."""
    listed = listed_files(paths)
    files = [str(content) for content in listed.contents]
    for file in files:
        if "://" not in file and not Path(file).exists():
            raise ValueError(f"there is no image {file}: check the path")
    names = [Path(name).name if "://" not in name else name for name in listed.names]
    return Images(Files(files), names, labels_of_folders(files, model), ", ".join(map(short, paths)))


def short(path: str) -> str:
    """The last part of a path; URLs stay."""
    return path if "://" in path else Path(path).resolve().name


def labels_of_folders(files: Sequence[str], model: Any) -> list[int] | None:
    """The class that the folder of each file is called, IGNORED_LABEL for other folders; None where all are others."""
    config = model.config
    if not is_classifier(model) or config.tasks or config.problem_type == "multi_label_classification":
        return None
    index = {name: place for place, name in enumerate(labels_of(config).names)}
    labels = [index.get(Path(file).resolve().parent.name, IGNORED_LABEL) for file in files]
    return labels if any(label != IGNORED_LABEL for label in labels) else None


def from_dataset(options: InspectOptions, model: Any, record: HeldOutRecord | None) -> Images:
    """One split, with the model's own label indices; without labels for a model that has none."""
    assert options.dataset is not None
    data = DataOptions(
        options.dataset,
        image_column=options.image_column,
        label_column=options.label_column,
        label_separator=options.label_separator,
    )
    if is_classifier(model):
        label_space, found, split, _ = load_evaluation_data(data, options.split, record)
        found = relabelled(found, label_space, labels_of(model.config))
        pictures, labels = found.pictures, found.labels
    else:
        split = options.split or "test"
        pictures, labels = unlabelled(data, split), None
    names = [f"{short(options.dataset)} {place}" for place in range(len(pictures))]
    return Images(pictures, names, labels, f"{short(options.dataset)}, split {split}")


def unlabelled(data: DataOptions, split: str) -> Sequence[Image.Image]:
    """The pictures of a split; of a data set of one split all."""

    def chosen(names: list[str]) -> list[str]:
        if split not in names and len(names) > 1:
            raise ValueError(f"{data.dataset} has no split {split!r}: choose one of {', '.join(names)}")
        return [split if split in names else names[0]]

    (part,) = load_splits(data, labelled=False, used=chosen).parts.values()
    return part.pictures
