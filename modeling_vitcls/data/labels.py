"""Labels of images as class indices, by kind; and the labels of a model.

kind             label of an image; None if missing    batch of labels (`collate`)
OneLabel         class index                           [B] int64
SeveralLabels    sorted list of class indices          [B, classes] float32, 0 or 1
PerTask          {task: class index; None if missing}  [B, tasks] int64

index(names, where)    names of the labels by column (cells.py) -> labels of images
collate(labels)        labels of images -> a batch, in which a missing label is -100, as in the loss
format(label)          label of an image -> text; None if it is missing
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..model.configuration_vitcls import ExtraHead, ViTCLSConfig
from ..model.heads_vitcls import IGNORED_LABEL
from .cells import normalize_name


NO_LABELS = "no label"  # Text for an image that has none of several labels

LabelKind = Literal["single_label_classification", "multi_label_classification", "multi_task"]
# Names of the labels of each image by column; None for an image whose labels are missing
Names = Mapping[str, Sequence[Sequence[str] | None]]


@dataclass(frozen=True)
class ClassNames:
    """Names of the classes by label column, in the order of their indices."""

    columns: dict[str, list[str]]
    # It separates several labels in one text of a table; "none": each is one label
    separator: str | None = field(default=None, compare=False)

    kind: ClassVar[LabelKind]
    description: ClassVar[str]

    @property
    def names(self) -> list[str]:
        """The class names of the only column."""
        (names,) = self.columns.values()
        return names

    @property
    def tasks(self) -> dict[str, Any]:
        """Task -> its labels. Without tasks, the only key is ""."""
        return {"": self}

    def to_config_values(self) -> dict[str, Any]:
        """Write the labels as fields of ViTCLSConfig."""
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
            "problem_type": self.kind,
        }

    def find_indices(self, names: Names, where: str) -> list[list[int] | None]:
        """Find the classes of each image. No other function turns names into indices.

        Raise ValueError with the row and `where`, the name of the images, for an unknown name.
        """
        (rows,) = names.values()
        index_by_name = {normalize_name(name): index for index, name in enumerate(self.names)}
        for row, each in enumerate(rows):
            for name in each or ():
                if normalize_name(name) not in index_by_name:
                    raise ValueError(
                        f"{where}: row {row} has the label {name!r}, not one of the "
                        f"{len(index_by_name)} classes"
                    )
        return [
            None if each is None else [index_by_name[normalize_name(name)] for name in each]
            for each in rows
        ]


class OneLabel(ClassNames):
    """Each image has one label."""

    kind = "single_label_classification"
    description = "one label per image"

    def index(self, names: Names, where: str) -> list[int | None]:
        return [None if each is None else each[0] for each in self.find_indices(names, where)]

    def collate(self, labels: Sequence[int | None]) -> Tensor:
        indices = [IGNORED_LABEL if label is None else label for label in labels]
        return torch.tensor(indices, dtype=torch.int64)

    def format(self, label: int | None) -> str | None:
        return None if label is None else self.names[label]


class SeveralLabels(ClassNames):
    """Each image has any number of labels of one column."""

    kind = "multi_label_classification"
    description = "several labels per image"

    def index(self, names: Names, where: str) -> list[list[int] | None]:
        return [
            None if each is None else sorted(set(each)) for each in self.find_indices(names, where)
        ]

    def collate(self, labels: Sequence[list[int]]) -> Tensor:
        multi_hot = torch.zeros(len(labels), len(self.names))
        for row, indices in enumerate(labels):
            assert indices is not None, "images without labels are dropped when they are read"
            multi_hot[row, indices] = 1
        return multi_hot

    def format(self, label: list[int] | None) -> str | None:
        if label is None:
            return None
        return ", ".join(self.names[index] for index in label) or NO_LABELS


class PerTask(ClassNames):
    """Each image has one label of each task, a column of its own. Columns are sorted by name."""

    kind = "multi_task"
    description = "one task per column"

    @property
    def tasks(self) -> dict[str, OneLabel]:
        """The labels of each task."""
        return {task: OneLabel({task: names}) for task, names in self.columns.items()}

    def to_config_values(self) -> dict[str, Any]:
        return {"tasks": self.columns}

    def index(self, names: Names, where: str) -> list[dict[str, int | None]]:
        labels = [each.index({task: names[task]}, where) for task, each in self.tasks.items()]
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*labels, strict=True)]

    def collate(self, labels: Sequence[dict[str, int | None]]) -> Tensor:
        columns = [
            each.collate([label[task] for label in labels]) for task, each in self.tasks.items()
        ]
        return torch.stack(columns, dim=1)

    def format(self, label: dict[str, int | None] | None) -> str | None:
        if label is None:
            return None
        texts = {task: each.format(label[task]) for task, each in self.tasks.items()}
        return ", ".join(f"{task} {text}" for task, text in texts.items() if text) or None


LabelSpace = OneLabel | SeveralLabels | PerTask

UNLABELED = OneLabel({})  # Datasets that are read without labels have it


# Of a model ---------------------------------------------------------------------------------------


def get_label_space(config: ViTCLSConfig) -> LabelSpace:
    """Read the label space of a classifier from its configuration."""
    if config.tasks:
        return PerTask(config.task_labels())
    id2label: dict[Any, str] = dict(config.id2label or {})
    columns = {"label": [id2label[index] for index in range(len(id2label))]}
    if config.problem_type == "multi_label_classification":
        return SeveralLabels(columns)
    return OneLabel(columns)


def get_heads(config: ViTCLSConfig, threshold: float | None = None) -> dict[str, ExtraHead]:
    """Find the labels of a model by task: its own (an empty name without tasks), then the added tasks.

    `threshold` is the probability from which one of several own labels is predicted. Raise ValueError
    for a model without labels, and for a threshold if an image has one label.
    """
    check_threshold(threshold, config)
    heads: dict[str, ExtraHead] = {}
    if not config.tasks and (config.num_labels or not config.extra_heads):
        check_is_classifier(config)
        kind: Any = (
            "multi_label_classification"
            if is_multi_label(config)
            else "single_label_classification"
        )
        names = get_label_space(config).names
        heads[""] = ExtraHead(names, problem_type=kind, threshold=threshold)
    for task, names in config.task_labels().items():
        heads[task] = ExtraHead(names)
    return heads | config.get_added_tasks()


def check_is_classifier(config: ViTCLSConfig) -> None:
    """Raise ValueError for a model without classes, or for regression."""
    if not config.tasks and (not config.num_labels or config.problem_type == "regression"):
        problem = "was trained for regression" if config.num_labels else "has no classifier"
        raise ValueError(
            f"labels require a classifier, but the model {problem}. Fine-tune a classifier, or "
            "write features with `vitcls predict --features cls`"
        )


def check_threshold(threshold: float | None, config: ViTCLSConfig) -> None:
    """Raise ValueError for a threshold of labels of which an image has exactly one."""
    if threshold is not None and not is_multi_label(config):
        raise ValueError(
            f"`threshold={threshold:g}` requires a model with several labels per image, but an image "
            "has one label of this model, the most probable one. Remove `threshold`"
        )


def is_multi_label(config: ViTCLSConfig) -> bool:
    """Tell whether a sigmoid is applied to each logit.

    As in transformers, a model with a single label may be multi-label as well.
    """
    return not config.tasks and (
        config.problem_type == "multi_label_classification" or config.num_labels == 1
    )
