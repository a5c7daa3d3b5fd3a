"""What labels are: one per image, several per image, or one per image and task.

kind                          label of one picture           batch of labels
single_label_classification   class index                    [B] int64
multi_label_classification    0.0 or 1.0 per class           [B, classes] float32
multi_task                    {task: class index or -100}    {task: [B] int64}
"""

from dataclasses import dataclass
from typing import Any, Literal


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
