"""Labels of a dataset as labels of a model: the indices are matched by the names of the labels.

Names are compared in the Unicode form NFC.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..runtime.errors import format_name_list
from .cells import normalize_name
from .labels import LabelSpace


PLACEHOLDER = re.compile(r"LABEL_\d+$")  # Transformers' names of labels without names


def translate_labels(images: Any, data_space: LabelSpace, model_space: LabelSpace) -> Any:
    """Convert the label indices of the dataset to the label indices of the model.

    Missing labels stay missing. Raise ValueError if the kinds of labels or the tasks
    differ, if the model has several labels with the same name, or if an image has a label that the
    model lacks.
    """
    if data_space.kind != model_space.kind:
        raise ValueError(
            f"the model was trained for {model_space.kind}, but the labels of the dataset are for "
            f"{data_space.kind}. Select other columns with `label_column`, or set `label_separator`"
        )
    if data_space.tasks.keys() != model_space.tasks.keys():
        raise ValueError(
            f"the model has the tasks {', '.join(model_space.tasks)}, but the dataset has "
            f"{', '.join(data_space.tasks)}. Select the columns of the tasks with `label_column`"
        )
    matches = {
        task: NameMatch(own.names, model_space.tasks[task].names)
        for task, own in data_space.tasks.items()
    }
    if data_space.kind == "multi_task":
        labels = [
            {task: matches[task].translate(each) for task, each in label.items()}
            for label in images.labels
        ]
    else:
        labels = [matches[""].translate(label) for label in images.labels]
    return replace(images, labels=labels)


class NameMatch:
    """The indices that the class names of a dataset have in a model."""

    def __init__(self, names: Sequence[str], model_names: Sequence[str]) -> None:
        self.names = names
        self.model_names = model_names
        self.indices: dict[str, list[int]] = {}  # Name -> its indices in the model
        for index, name in enumerate(model_names):
            self.indices.setdefault(normalize_name(name), []).append(index)

    def translate(self, label: Any) -> Any:
        """Translate a class index, a list of class indices or None, a missing label."""
        if isinstance(label, list):
            return sorted(map(self.find_index, label))
        return None if label is None else self.find_index(label)

    def find_index(self, index: int) -> int:
        """Find the model's index of a class. Raise ValueError if there is none, or several."""
        name = self.names[index]
        found = self.indices.get(normalize_name(name), [])
        if len(found) > 1:
            raise ValueError(
                f"the model has several labels with the name {name!r}. Give these labels different "
                "names in the model's config.json"
            )
        if not found and all(map(PLACEHOLDER.match, self.model_names)):
            example = ", ".join(f'"{index}": "{each}"' for index, each in enumerate(self.names))
            raise ValueError(
                f"the labels of the model have no names ({len(self.model_names)} labels, LABEL_0 "
                f"...), but the dataset has {name!r}. Set `id2label` in the model's config.json, in "
                f'the order of its training: "id2label": {{{example}}}'
            )
        if not found:
            raise ValueError(
                f"the dataset has the label {name!r}, but the model has only the labels "
                f"{format_name_list(self.model_names, 20)}. Remove the images with this label, add "
                "the class with `vitcls add-class`, or, if they are the same, correct `id2label` in "
                "the model's config.json"
            )
        return found[0]
