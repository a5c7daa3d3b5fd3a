"""Kinds of labels: one per image, several per image, or one per image and task.

kind                          label of one image             batch of labels
single_label_classification   class index                    [B] int64
multi_label_classification    0.0 or 1.0 per class           [B, classes] float32
multi_task                    {task: class index or -100}    {task: [B] int64}
"""

from dataclasses import dataclass
from typing import Any, Literal

from ..configuration_vitcls import ViTCLSConfig


NOTHING = "nothing"  # text for an image without any of several labels

LabelKind = Literal["single_label_classification", "multi_label_classification", "multi_task"]


@dataclass(frozen=True)
class LabelSpace:
    """The kind of labels, and their names by column. Only a multi-task dataset has several columns."""

    kind: LabelKind
    columns: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        """The label names of the only column."""
        (names,) = self.columns.values()
        return names

    def config_values(self) -> dict[str, Any]:
        """Return the fields of ViTCLSConfig that describe these labels."""
        if self.kind == "multi_task":
            return {"tasks": self.columns}
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
            "problem_type": self.kind,
        }

    def in_words(self, label: Any) -> str | None:
        """Return the label of one image as text, such as "cat", "cat, dog" or "age old, kind cat".

        Args:
            label: a label in the format above; None or a negative class index if it is unknown.

        Returns:
            The text; None if the label is unknown.
        """
        if isinstance(label, dict):
            known = {task: names for task, names in self.columns.items() if is_known(label.get(task))}
            return ", ".join(f"{task} {names[label[task]]}" for task, names in known.items()) or None
        if isinstance(label, list | tuple):
            return ", ".join(name for name, value in zip(self.names, label, strict=True) if value) or NOTHING
        return self.names[label] if is_known(label) else None


def labels_of(config: ViTCLSConfig) -> LabelSpace:
    """Return the label space of a classifier."""
    if config.tasks:
        return LabelSpace("multi_task", config.task_labels())
    id2label: dict[Any, str] = dict(config.id2label or {})
    names = [id2label[index] for index in range(len(id2label))]
    is_multi_label = config.problem_type == "multi_label_classification"
    return LabelSpace(
        "multi_label_classification" if is_multi_label else "single_label_classification", {"label": names}
    )


def is_known(label: int | None) -> bool:
    """Return whether a label is a valid class index; None, -100 (IGNORED_LABEL) and other negative values are not."""
    return label is not None and label >= 0


def is_multi_label(config: ViTCLSConfig) -> bool:
    """Return whether each label has its own sigmoid; also with only one label, as in the transformers pipeline."""
    return not config.tasks and (config.problem_type == "multi_label_classification" or config.num_labels == 1)
