"""Labels of a dataset as class indices, by kind; and which labels a model has.

    kind                          label of one image (`LabelSpace.index`)    batch of labels (`collate`)
    multi_task                    {task: class index or -100}                {task: [B] int64}
    multi_label_classification    sorted list of class indices               [B, classes] float32, 0 or 1
    single_label_classification   class index                                [B] int64

The names are read from the cells of a table in cells.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from ..model.configuration_vitcls import ExtraHead, ViTCLSConfig
from ..model.heads_vitcls import IGNORED_LABEL
from .cells import normalize_name


NO_LABELS = "no label"  # text for an image without labels in a multi-label dataset

LabelKind = Literal["single_label_classification", "multi_label_classification", "multi_task"]


@dataclass(frozen=True)
class LabelSpace:
    """Kind of labels, and label names by column. Only a multi-task dataset has several columns."""

    kind: LabelKind
    columns: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        """Return the label names of the only column."""
        (names,) = self.columns.values()
        return names

    @property
    def tasks(self) -> list[str | None]:
        """Return the tasks; None is the only one of a dataset that is not multi-task."""
        return list(self.columns) if self.kind == "multi_task" else [None]

    def get_names(self, task: str | None) -> list[str]:
        """Return the label names of one of `tasks`."""
        return self.names if task is None else self.columns[task]

    @cached_property
    def index_by_name(self) -> dict[str, dict[str, int]]:
        """Index the classes by column and by class name in the Unicode form NFC."""
        return {
            column: {normalize_name(name): index for index, name in enumerate(names)}
            for column, names in self.columns.items()
        }

    def to_config_values(self) -> dict[str, Any]:
        """Write the labels as fields of ViTCLSConfig."""
        if self.kind == "multi_task":
            return {"tasks": self.columns}
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
            "problem_type": self.kind,
        }

    def index(self, names: Mapping[str, Sequence[Sequence[str] | None]], where: str) -> Any:
        """Turn the labels of images into indices. No other function turns names into integers.

        Args:
            names: label names of each image by column; None for an image whose labels are missing,
                which has the label -100.
            where: name of the images in error messages.

        Returns:
            A list of indices, of lists of indices, or of {task: index}.

        Raises:
            ValueError: if a name is not one of the classes. The message contains the row.
        """
        indices = {}
        for column, rows in names.items():
            index_by_name = self.index_by_name[column]
            for row, each in enumerate(rows):
                for name in each or ():
                    if normalize_name(name) not in index_by_name:
                        raise ValueError(
                            f"{where}: row {row} has the label {name!r}, not one of the "
                            f"{len(index_by_name)} classes"
                        )
            indices[column] = [
                [IGNORED_LABEL]
                if each is None
                else [index_by_name[normalize_name(name)] for name in each]
                for each in rows
            ]

        if self.kind == "multi_label_classification":
            (lists,) = indices.values()
            return [IGNORED_LABEL if IGNORED_LABEL in each else sorted(set(each)) for each in lists]
        values = [[next(iter(each), IGNORED_LABEL) for each in rows] for rows in indices.values()]
        if self.kind == "single_label_classification":
            return values[0]
        return [dict(zip(indices, row, strict=True)) for row in zip(*values, strict=True)]

    def list_names(self, labels: Any) -> dict[str, list[list[str]]]:
        """List the label names of images by column, the input of `index`."""
        if self.kind == "multi_task":
            indices = {task: [[label[task]] for label in labels] for task in self.columns}
        elif self.kind == "multi_label_classification":
            indices = dict.fromkeys(self.columns, labels)
        else:
            indices = {column: [[label] for label in labels] for column in self.columns}
        return {
            column: [
                [names[index] for index in each if is_known(index)] for each in indices[column]
            ]
            for column, names in self.columns.items()
        }

    def collate(self, labels: list[Any]) -> Any:
        """Batch the labels of images as tensors, in the format of the kind of labels."""
        if self.kind == "multi_task":
            return {
                task: torch.tensor([label[task] for label in labels], dtype=torch.int64)
                for task in self.columns
            }
        if self.kind == "multi_label_classification":
            multi_hot = torch.zeros(len(labels), len(self.names))
            for row, indices in enumerate(labels):
                multi_hot[row, indices] = 1
            return multi_hot
        return torch.tensor(labels, dtype=torch.int64)

    def format_label(self, label: Any) -> str | None:
        """Write a label as text; None for an unknown label.

        Examples: "cat", "cat, dog", "age old, kind cat".
        """
        if isinstance(label, dict):
            known_tasks = {
                task: names for task, names in self.columns.items() if is_known(label.get(task))
            }
            return (
                ", ".join(f"{task} {names[label[task]]}" for task, names in known_tasks.items())
                or None
            )
        if isinstance(label, list):
            return ", ".join(self.names[index] for index in label) or NO_LABELS
        return self.names[label] if is_known(label) else None


# label space of datasets that are read without labels
UNLABELED = LabelSpace("single_label_classification", {})


def get_label_space(config: ViTCLSConfig) -> LabelSpace:
    """Read the label space of a classifier from its configuration."""
    if config.tasks:
        return LabelSpace("multi_task", config.task_labels())
    id2label: dict[Any, str] = dict(config.id2label or {})
    names = [id2label[index] for index in range(len(id2label))]
    if config.problem_type == "multi_label_classification":
        return LabelSpace("multi_label_classification", {"label": names})
    return LabelSpace("single_label_classification", {"label": names})


def get_heads(config: ViTCLSConfig, threshold: float | None = None) -> dict[str, ExtraHead]:
    """Find the labels of a model by task: its own (an empty name without tasks), then the added tasks.

    `threshold` is the probability from which one of several own labels is predicted. Raise ValueError
    for a model without labels.
    """
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


def is_known(label: int | None) -> bool:
    """Return whether a label is a class index.

    Missing labels are None, -100 (IGNORED_LABEL) or another negative value.
    """
    return label is not None and label >= 0


def is_multi_label(config: ViTCLSConfig) -> bool:
    """Return whether a sigmoid is applied to each logit.

    As in transformers, a model with a single label may be multi-label as well.
    """
    return not config.tasks and (
        config.problem_type == "multi_label_classification" or config.num_labels == 1
    )
