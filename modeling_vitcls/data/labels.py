"""What labels are: one per image, several per image, or one per image and task.

kind                          label of one picture           batch of labels
single_label_classification   class index                    [B] int64
multi_label_classification    0.0 or 1.0 per class           [B, classes] float32
multi_task                    {task: class index or -100}    {task: [B] int64}
"""

from dataclasses import dataclass
from typing import Any, Literal

from ..configuration_vitcls import ViTCLSConfig


NOTHING = "nothing"  # in words, of a picture with none of several labels

LabelKind = Literal["single_label_classification", "multi_label_classification", "multi_task"]


@dataclass(frozen=True)
class LabelSpace:
    """The kind of labels, and their names by column; only a multi-task data set has several columns."""

    kind: LabelKind
    columns: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        """The label names of the only column."""
        (names,) = self.columns.values()
        return names

    def config_values(self) -> dict[str, Any]:
        """The fields of ViTCLSConfig that describe such labels."""
        if self.kind == "multi_task":
            return {"tasks": self.columns}
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
            "problem_type": self.kind,
        }

    def in_words(self, label: Any) -> str | None:
        """The label of one picture as people read it, such as "cat", "cat, dog" or "age old, kind cat".

        Args:
            label: as above; also None or, of a class index, a negative one, where it is not known.

        Returns:
            None where nothing is known.
        """
        if isinstance(label, dict):
            known = {task: names for task, names in self.columns.items() if is_known(label.get(task))}
            return ", ".join(f"{task} {names[label[task]]}" for task, names in known.items()) or None
        if isinstance(label, list | tuple):
            return ", ".join(name for name, value in zip(self.names, label, strict=True) if value) or NOTHING
        return self.names[label] if is_known(label) else None


def labels_of(config: ViTCLSConfig) -> LabelSpace:
    """The labels that a classifier answers with."""
    if config.tasks:
        return LabelSpace("multi_task", config.task_labels())
    id2label: dict[Any, str] = dict(config.id2label or {})
    names = [id2label[index] for index in range(len(id2label))]
    is_multi_label = config.problem_type == "multi_label_classification"
    return LabelSpace(
        "multi_label_classification" if is_multi_label else "single_label_classification", {"label": names}
    )


def is_known(label: int | None) -> bool:
    """Whether a class index says anything: -100 (IGNORED_LABEL) and other negative ones do not."""
    return label is not None and label >= 0


def is_multi_label(config: ViTCLSConfig) -> bool:
    """Whether each label is a question of its own, yes or no; so is a single label, as in transformers' pipeline."""
    return not config.tasks and (config.problem_type == "multi_label_classification" or config.num_labels == 1)
