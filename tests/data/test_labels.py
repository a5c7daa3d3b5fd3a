"""Labels of single values: integers and text, declared or not, with and without class names."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import pytest
from helpers.tiny_models import raises_one_line

from modeling_vitcls.data.cells import name_items
from modeling_vitcls.data.columns import find_image_column, read_labels
from modeling_vitcls.data.labels import (
    LabelSpace,
    OneLabel,
    PerTask,
    SeveralLabels,
    get_label_space,
    is_multi_label,
)
from modeling_vitcls.model.configuration_vitcls import ViTCLSConfig


def read(
    values: list[Any], feature: Any = None, names: tuple[str, ...] | None = None, **flags: Any
) -> tuple[list[str], Any]:
    """Return the classes and the labels of a column with these values."""
    features = None if feature is None else datasets.Features({"label": feature})
    table = datasets.Dataset.from_dict({"label": values}, features)
    space, labels = read_labels(
        {"train": table}, ["label"], "table.csv", label_names=names, **flags
    )
    return space.names, list(labels["train"])


def test_minus_one_is_a_class_unless_the_column_is_declared() -> None:
    assert read([-1, 0, 1]) == (["-1", "0", "1"], [0, 1, 2])
    declared = datasets.ClassLabel(names=["no", "yes"])
    assert read([0, 1, -1], declared) == (["no", "yes"], [0, 1, None])


def test_an_index_of_a_declared_column_is_never_a_name() -> None:
    found = name_items({"0": [0], "7": [7]}, ["no", "7"], is_declared=True, has_vectors=False)
    space = OneLabel({"label": ["no", "7"]})
    with raises_one_line("row 1 has the label 'index 7', not one of the 2 classes"):
        space.index({"label": list(found.values())}, "table.csv")


def test_undeclared_integers_are_names_sorted_by_value() -> None:
    assert read([10, 9, 100, None]) == (["9", "10", "100"], [1, 0, 2, None])
    assert read([10.0, 9.0]) == (["9", "10"], [1, 0])


@pytest.mark.parametrize("names", [("cat", "7", "dog"), ("cat", "-7", "dog")])
def test_integers_are_never_indices_if_any_name_is_an_integer(names: tuple[str, ...]) -> None:
    assert read(["cat", names[1], "dog"], names=names)[1] == [0, 1, 2]
    assert read([int(names[1])], names=names)[1] == [1]
    for value in (0, 1, 2, -1):
        with raises_one_line(f"row 0 has the label '{value}', not one of the 3 classes"):
            read([value], names=names)


def test_integers_are_indices_if_no_name_is_an_integer() -> None:
    for values in ([0, 1], ["0", "1"], [0.0, 1.0], ["cat", "dog"]):
        assert read(values, names=("cat", "dog"))[1] == [0, 1]
    for value in (-1, 2, "00", 0.5):
        with raises_one_line(f"row 0 has the label '{value}', not one of the 2 classes"):
            read([value], names=("cat", "dog"))


def test_empty_text_and_nan_are_missing_labels() -> None:
    assert read(["b", "", "a", None]) == (["a", "b"], [1, None, 0, None])
    assert read([1.0, math.nan]) == (["1"], [0, None])


def test_empty_text_between_separators_is_not_a_label() -> None:
    values = ["b | a", None, "|b|| ", "", " | "]
    names, labels = read(values, separator="|")
    assert names == ["a", "b"]
    assert labels == [[0, 1], None, [1], None, None]
    with raises_one_line("row 1 has the label 'c'"):
        read(["a", "b|c"], names=("a", "b"), separator="|")


def test_an_empty_list_is_none_of_the_labels_and_an_empty_cell_is_missing() -> None:
    assert read([["b", "a"], [], None])[1] == [[0, 1], [], None]
    assert read(["b|a", "[]", ""], separator="|")[1] == [[0, 1], [], None]
    declared = datasets.List(datasets.ClassLabel(names=["a", "b"]))
    assert read([[1], [], [-1], None], declared)[1] == [[1], [], None, None]


@pytest.mark.parametrize("value", [0.5, {"x": 1}, [["a"], ["b"]]])
def test_columns_of_other_values_are_not_labels(value: Any) -> None:
    with raises_one_line("'label'", "`label_column`"):
        read([value])


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


@pytest.mark.parametrize(
    "build", [datasets.List, datasets.LargeList, datasets.Sequence, lambda feature: [feature]]
)
def test_each_type_of_list_contains_several_labels(build: Callable[[Any], Any]) -> None:
    declared = build(datasets.ClassLabel(names=["1", "0"]))
    assert read([[1], [1, 0], []], declared) == (["1", "0"], [[1], [0, 1], []])
    assert read([["b"], ["a"]], build(datasets.Value("string")))[0] == ["a", "b"]


def test_the_image_column_contains_images() -> None:
    """A usual name is only used among columns of images, or if no column contains images."""
    find = partial(find_image_column, "table", column=None)
    image = datasets.Image()
    text = datasets.Value("string")

    encoded = {"bytes": datasets.Value("binary"), "path": text, "source": text}
    for feature in (image, encoded, datasets.Value("binary")):
        features = {"image": text, "thumbnail": feature, "photo": feature}
        assert find(features) == "photo"
        assert find({"image": text, "thumbnail": feature}) == "thumbnail"
    assert find({"box": {"path": text}, "id": text, "file": text}) == "file"
    with raises_one_line("cannot identify the image column among a, b. Set `image_column`"):
        find({"a": image, "b": image})
