"""Labels of a dataset as labels of a model: the indices are matched by the names of the labels.

Names are compared in the Unicode form NFC.
"""

import re
from collections import Counter
from dataclasses import replace
from itertools import chain
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
    names = data_space.list_names(images.labels)
    if data_space.kind != "multi_task":  # The columns of the dataset and of the model differ
        names = dict(zip(model_space.columns, names.values(), strict=True))
    if names.keys() != model_space.columns.keys():
        raise ValueError(
            f"the model has the tasks {', '.join(model_space.columns)}, but the dataset has "
            f"{', '.join(names)}. Select the columns of the tasks with `label_column`"
        )
    for column, rows in names.items():
        counts = Counter(map(normalize_name, model_space.columns[column]))
        for name in sorted(set(chain(*filter(None, rows)))):
            if counts[normalize_name(name)] == 1:
                continue
            if counts[normalize_name(name)]:
                raise ValueError(
                    f"the model has several labels with the name {name!r}. Give these labels "
                    "different names in the model's config.json"
                )
            if all(PLACEHOLDER.match(each) for each in model_space.columns[column]):
                pairs = enumerate(sorted(set(chain(*filter(None, rows)))))
                example = ", ".join(f'"{index}": "{each}"' for index, each in pairs)
                raise ValueError(
                    f"the labels of the model have no names ({counts.total()} labels, LABEL_0 ...), "
                    f"but the dataset has {name!r}. Set `id2label` in the model's config.json, in "
                    f'the order of its training: "id2label": {{{example}}}'
                )
            raise ValueError(
                f"the dataset has the label {name!r}, but the model has only the labels "
                f"{format_name_list(model_space.columns[column], 20)}. Remove the images with this "
                "label, add the class with `vitcls add-class`, or, if they are the same, correct "
                "`id2label` in the model's config.json"
            )
    return replace(images, labels=model_space.index(names, "the dataset"))
