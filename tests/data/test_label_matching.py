"""Labels of a dataset are matched with those of a model by their names."""

import pytest
from helpers.tiny_models import raises_one_line

from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.data.label_matching import match_labels
from modeling_vitcls.data.labels import LabelSpace, MultiHotLabels


def build_single_label_space(*names: str) -> LabelSpace:
    return LabelSpace("single_label_classification", {"label": list(names)})


def test_labels_are_matched_to_the_model_by_name() -> None:
    pictures = LabeledImages([], [0, 1, 0])
    assert match_labels(
        pictures,
        build_single_label_space("noon", "dusk"),
        build_single_label_space("dawn", "dusk", "noon"),
    ).labels == [2, 1, 2]

    with raises_one_line("'noon'", "only the labels label 0. Remove"):
        match_labels(
            pictures,
            build_single_label_space("noon", "label 0"),
            build_single_label_space("label 0"),
        )

    # an unused name has no effect
    match_labels(
        LabeledImages([], [1]),
        build_single_label_space("noon", "dusk"),
        build_single_label_space("dusk"),
    )


def test_several_labels_are_matched_by_name() -> None:
    kind = "multi_label_classification"
    given = LabelSpace(kind, {"tags": ["b", "c", "a"]})
    known = LabelSpace(kind, {"label": ["a", "b", "d", "e"]})
    labels = MultiHotLabels.from_indices([[0], [0, 2], []], 3)
    matched = match_labels(LabeledImages([], labels), given, known)
    assert list(matched.labels) == [[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0] * 4]
    with pytest.raises(ValueError, match="the label 'c', but the model has only the labels"):
        match_labels(LabeledImages([], MultiHotLabels.from_indices([[1]], 3)), given, known)


def test_tasks_are_matched_by_name() -> None:
    given = LabelSpace("multi_task", {"b": ["y", "x"], "a": ["q", "p"]})
    known = LabelSpace("multi_task", {"a": ["p", "q"], "b": ["x", "y"]})
    matched = match_labels(LabeledImages([], [{"b": 0, "a": 0}, {"b": -100, "a": 1}]), given, known)

    assert matched.labels == [{"a": 1, "b": 1}, {"a": 0, "b": -100}]
    with pytest.raises(
        ValueError, match=r"the model has the tasks a, c, but the dataset has b, a. Select"
    ):
        match_labels(
            LabeledImages([], []), given, LabelSpace("multi_task", {"a": ["p"], "c": ["x"]})
        )
    with raises_one_line("multi_task", "`label_column`"):
        match_labels(LabeledImages([], []), given, build_single_label_space("a"))
