"""Labels of single values: integers and text, declared or not, with and without class names."""

import math
from collections.abc import Callable
from typing import Any

import datasets
import pytest
from helpers.tiny_models import raises_one_line

from modeling_vitcls.data.labels import (
    LabelReader,
    LabelSpace,
    build_label_reader,
    find_image_column,
    get_label_space,
    is_multi_label,
)
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.model.configuration_vitcls import ViTCLSConfig


INTEGERS = datasets.Value("int64")


def build_reader(
    values: list[Any], feature: Any = INTEGERS, names: tuple[str, ...] | None = None, **flags: Any
) -> LabelReader:
    """Build the reader of a column `label` with these values."""
    options = DataOptions(dataset="table.csv", label_names=names, **flags)
    return build_label_reader(options, {"train": {"label": feature}}, lambda column: values)


def read_all(reader: LabelReader, values: list[Any]) -> list[Any]:
    """Return the labels of rows with these values."""
    return [reader.read({"label": value}, "row") for value in values]


def test_minus_one_is_a_class_unless_the_column_is_declared() -> None:
    reader = build_reader([1, -1, 0])
    assert reader.label_space.names == ["-1", "0", "1"]
    assert read_all(reader, [-1, 0, 1]) == [0, 1, 2]
    declared = build_reader([], datasets.ClassLabel(names=["no", "yes"]))
    assert read_all(declared, [0, 1, -1]) == [0, 1, -100]  # -1 is a missing label
    with raises_one_line("row has the label 7, not one of the 2 classes"):  # an index, not a name
        build_reader([], datasets.ClassLabel(names=["no", "7"])).read({"label": 7}, "row")


def test_undeclared_integers_are_names_sorted_by_value() -> None:
    reader = build_reader([10, 9, 100, None])
    assert reader.label_space.names == ["9", "10", "100"]
    assert read_all(reader, [9, 10, 100, 10.0, "9"]) == [0, 1, 2, 1, 0]
    for value in (0, 1, 2, -1, 3):  # not an index
        with raises_one_line(f"row has the label {value}, not one of the 3 classes"):
            reader.read({"label": value}, "row")


@pytest.mark.parametrize("names", [("cat", "7", "dog"), ("cat", "-7", "dog")])
def test_integers_are_never_indices_if_any_name_is_an_integer(names: tuple[str, ...]) -> None:
    reader = build_reader([], names=names)
    assert read_all(reader, ["cat", int(names[1]), names[1], "dog"]) == [0, 1, 1, 2]
    for value in (0, 1, 2, -1):
        with raises_one_line(f"row has the label {value}, not one of the 3 classes"):
            reader.read({"label": value}, "row")


def test_integers_are_indices_if_no_name_is_an_integer() -> None:
    reader = build_reader([], names=("cat", "dog"), label_column=("label",))
    assert read_all(reader, [0, 1, 1.0, "1", "cat", "dog"]) == [0, 1, 1, 1, 0, 1]
    for value in (-1, 2, "00", 0.5):
        with raises_one_line(f"row has the label {value!r}, not one of the 2 classes"):
            reader.read({"label": value}, "row")


def test_names_of_mixed_types_are_sorted_numbers_first() -> None:
    reader = build_reader(["b", 10, "a", 9], datasets.Value("string"))
    assert reader.label_space.names == ["9", "10", "a", "b"]
    assert read_all(reader, [10, "10", "b"]) == [1, 1, 3]


def test_empty_text_and_nan_are_missing_labels() -> None:
    reader = build_reader(["b", "", "a", None, math.nan], datasets.Value("string"))
    assert reader.label_space.names == ["a", "b"]
    assert read_all(reader, ["", None, math.nan, "b"]) == [-100, -100, -100, 1]


def test_empty_text_between_separators_is_not_a_label() -> None:
    reader = build_reader(["b|a", None, "|b||", " "], datasets.Value("string"), label_separator="|")
    assert reader.label_space == LabelSpace("multi_label_classification", {"label": ["a", "b"]})
    assert read_all(reader, ["b | a", None, "|b|| ", ""]) == [
        [1.0, 1.0],
        [0.0, 0.0],
        [0.0, 1.0],
        [0.0, 0.0],
    ]
    with raises_one_line("row 1 has the label 'c'"):
        reader.read_columns([["a", "b|c"]], "row {}".format)


@pytest.mark.parametrize("value", [0.5, {"x": 1}, [["a"], ["b"]]])
def test_columns_of_other_values_are_not_labels(value: Any) -> None:
    with raises_one_line("'label'", "`label_column`"):
        build_reader([value])


SINGLE = LabelSpace("single_label_classification", {"label": ["cat", "dog"]})
SEVERAL = LabelSpace("multi_label_classification", {"label": ["cat", "dog"]})
TASKS = LabelSpace("multi_task", {"kind": ["cat", "dog"], "age": ["young", "old"]})


@pytest.mark.parametrize(
    ("label_space", "label", "text"),
    [
        (SINGLE, 1, "dog"),
        (SINGLE, -100, None),
        (SINGLE, None, None),
        (SEVERAL, [1.0, 1.0], "cat, dog"),
        (SEVERAL, (0.0, 0.0), "no label"),
        (TASKS, {"kind": 0, "age": 1}, "kind cat, age old"),
        (TASKS, {"kind": -100, "age": 0}, "age young"),
        (TASKS, {"kind": -100, "age": -100}, None),
    ],
)
def test_labels_are_shown_by_their_names(
    label_space: LabelSpace, label: Any, text: str | None
) -> None:
    assert label_space.format_label(label) == text


@pytest.mark.parametrize("label_space", [SINGLE, SEVERAL, TASKS])
def test_a_label_space_survives_the_configuration(label_space: LabelSpace) -> None:
    config = ViTCLSConfig(**label_space.to_config_values(), num_cls_tokens=2)
    assert get_label_space(config) == label_space
    assert is_multi_label(config) == (label_space is SEVERAL)


@pytest.mark.parametrize(
    "build", [datasets.List, datasets.LargeList, datasets.Sequence, lambda feature: [feature]]
)
def test_each_type_of_list_contains_several_labels(build: Callable[[Any], Any]) -> None:
    reader = build_reader([], build(datasets.ClassLabel(names=["1", "0"])))
    assert reader.label_space == LabelSpace("multi_label_classification", {"label": ["1", "0"]})
    assert read_all(reader, [[1], [1, 0], []]) == [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert build_reader([["b"], ["a"]], build(datasets.Value("string"))).label_space.columns == {
        "label": ["a", "b"]
    }


def test_the_image_column_contains_images() -> None:
    """A usual name is only used among columns of images, or if no column contains images."""
    options = DataOptions(dataset="table")
    image = datasets.Image()
    text = datasets.Value("string")

    encoded = {"bytes": datasets.Value("binary"), "path": text, "source": text}
    for feature in (image, encoded, datasets.Value("binary")):
        features = {"image": text, "thumbnail": feature, "photo": feature}
        assert find_image_column(options, features) == "photo"
        assert find_image_column(options, {"image": text, "thumbnail": feature}) == "thumbnail"
    assert find_image_column(options, {"box": {"path": text}, "id": text, "file": text}) == "file"
    with raises_one_line("cannot identify the image column among a, b. Set `image_column`"):
        find_image_column(options, {"a": image, "b": image})
