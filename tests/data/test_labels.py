"""Labels as text, and in the configuration of a model."""

from typing import Any

import pytest

from modeling_vitcls.data.labels import (
    LabelSpace,
    OneLabel,
    PerTask,
    SeveralLabels,
    get_label_space,
    is_multi_label,
)
from modeling_vitcls.model.configuration_vitcls import ViTCLSConfig


SINGLE = OneLabel({"label": ["cat", "dog"]})
SEVERAL = SeveralLabels({"label": ["cat", "dog"]})
TASKS = PerTask({"kind": ["cat", "dog"], "age": ["young", "old"]})


@pytest.mark.parametrize(
    ("label_space", "label", "text"),
    [
        (SINGLE, 1, "dog"),
        (SINGLE, None, None),
        (SEVERAL, [0, 1], "cat, dog"),
        (SEVERAL, [], "no label"),
        (TASKS, {"kind": 0, "age": 1}, "kind cat, age old"),
        (TASKS, {"kind": None, "age": 0}, "age young"),
        (TASKS, {"kind": None, "age": None}, None),
    ],
)
def test_labels_are_shown_by_their_names(
    label_space: LabelSpace, label: Any, text: str | None
) -> None:
    assert label_space.format(label) == text


@pytest.mark.parametrize("label_space", [SINGLE, SEVERAL, TASKS])
def test_a_label_space_survives_the_configuration(label_space: LabelSpace) -> None:
    config = ViTCLSConfig(**label_space.to_config_values(), num_cls_tokens=2)
    assert get_label_space(config) == label_space
    assert is_multi_label(config) == (label_space is SEVERAL)
