"""Labels of a dataset as labels of a model: the indices are matched by the names of the labels.

Names are compared in the Unicode form NFC.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any
from unicodedata import normalize

from ..model.heads_vitcls import IGNORED_LABEL
from ..runtime.errors import format_name_list
from .labels import LabelSpace, MultiHotLabels


def match_labels(images: Any, data_space: LabelSpace, model_space: LabelSpace) -> Any:
    """Convert the label indices of the dataset to the label indices of the model.

    Labels are matched by name, and missing labels (-100) are left unchanged. Raise ValueError if
    the kinds of labels or the tasks differ, if the model has several labels with the same name, or
    if an image has a label that the model lacks.
    """
    if data_space.kind != model_space.kind:
        raise ValueError(
            f"the model was trained for {model_space.kind}, but the labels of the dataset are for "
            f"{data_space.kind}. Select other columns with `label_column`, or set `label_separator`"
        )
    if data_space.kind == "multi_task" and data_space.columns.keys() != model_space.columns.keys():
        raise ValueError(
            f"the model has the tasks {', '.join(model_space.columns)}, but the dataset has "
            f"{', '.join(data_space.columns)}. Select the columns of the tasks with `label_column`"
        )
    for task in model_space.tasks:
        counts = Counter(normalize("NFC", name) for name in model_space.get_names(task))
        repeated = [
            name
            for name in sorted(set(data_space.get_names(task)))
            if counts[normalize("NFC", name)] > 1
        ]
        if repeated:
            raise ValueError(
                f"the model has several labels with the name {repeated[0]!r}, so that images of "
                "the dataset cannot be matched with one of them. Give these labels different "
                "names in the model's config.json"
            )
    convert = partial(convert_label, data_space, model_space)
    if isinstance(images.labels, MultiHotLabels):
        rows = (map(convert, indices) for indices in images.labels.indices)
        return replace(images, labels=MultiHotLabels.from_indices(rows, len(model_space.names)))
    return replace(images, labels=list(map(convert, images.labels)))


def convert_label(
    data_space: LabelSpace, model_space: LabelSpace, label: Any, task: str | None = None
) -> Any:
    """Convert a label of a dataset to the label of the model with the same name.

    `task` is the task of an index.
    """
    if isinstance(label, dict):
        return {
            name: convert_label(data_space, model_space, label[name], name)
            for name in model_space.columns
        }
    if label == IGNORED_LABEL:
        return IGNORED_LABEL

    data_names = data_space.get_names(task)
    index_by_name = model_space.index_by_name[task or next(iter(model_space.columns))]
    name = normalize("NFC", data_names[label])
    if name in index_by_name:
        return index_by_name[name]
    names = format_name_list(model_space.get_names(task), 20)
    if not {normalize("NFC", name) for name in data_names} & index_by_name.keys():
        raise ValueError(
            f"the classes differ: the dataset has {format_name_list(data_names, 20)}, but the "
            f"model has {names}. Fine-tune the model on these classes, or set `frozen='knn'` "
            "to evaluate its features"
        )
    raise ValueError(
        f"the dataset has the label {name!r}, but the model has only the labels {names}. "
        "Remove the images with this label"
    )
