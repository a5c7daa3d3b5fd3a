"""Labels of single values: integers and text, declared or not, with and without class names."""

from typing import Any

import datasets
import pytest
from tiny_models import raises_one_line

from modeling_vitcls.data.labels import LabelReader, build_label_reader
from modeling_vitcls.options import DataOptions


INTEGERS = datasets.Value("int64")


def build_reader(values: list[Any], feature: Any = INTEGERS, names: tuple[str, ...] | None = None) -> LabelReader:
    """Build the reader of a column `label` with these values."""
    options = DataOptions(dataset="table.csv", label_names=names)
    return build_label_reader(options, {"label": feature}, lambda column: values)


def read_all(reader: LabelReader, values: list[Any]) -> list[Any]:
    """Return the labels of rows with these values."""
    return [reader.read({"label": value}, "row") for value in values]


def test_minus_one_is_a_class_unless_the_column_is_declared() -> None:
    reader = build_reader([1, -1, 0])
    assert reader.space.names == ["-1", "0", "1"]
    assert read_all(reader, [-1, 0, 1]) == [0, 1, 2]
    declared = build_reader([], datasets.ClassLabel(names=["no", "yes"]))
    assert read_all(declared, [0, 1, -1]) == [0, 1, -100]  # -1 is a missing label


def test_undeclared_integers_are_names_sorted_by_value() -> None:
    reader = build_reader([10, 9, 100, None])
    assert reader.space.names == ["9", "10", "100"]
    assert read_all(reader, [9, 10, 100, 10.0, "9"]) == [0, 1, 2, 1, 0]
    for value in (0, 1, 2, -1, 3):  # not an index
        with raises_one_line(f"row has the label {value}, which is not one of the 3 classes"):
            reader.read({"label": value}, "row")


@pytest.mark.parametrize("names", [("cat", "7", "dog"), ("cat", "-7", "dog")])
def test_integers_are_never_indices_if_any_name_is_an_integer(names: tuple[str, ...]) -> None:
    reader = build_reader([], names=names)
    assert read_all(reader, ["cat", int(names[1]), names[1], "dog"]) == [0, 1, 1, 2]
    for value in (0, 1, 2, -1):
        with raises_one_line(f"row has the label {value}, which is not one of the 3 classes"):
            reader.read({"label": value}, "row")


def test_integers_are_indices_if_no_name_is_an_integer() -> None:
    reader = build_reader([], names=("cat", "dog"))
    assert read_all(reader, [0, 1, 1.0, "cat", "dog"]) == [0, 1, 1, 0, 1]
    for value in (-1, 2, "0", 0.5):
        with raises_one_line(f"row has the label {value!r}, which is not one of the 2 classes"):
            reader.read({"label": value}, "row")


def test_names_of_mixed_types_are_sorted_numbers_first() -> None:
    reader = build_reader(["b", 10, "a", 9], datasets.Value("string"))
    assert reader.space.names == ["9", "10", "a", "b"]
    assert read_all(reader, [10, "10", "b"]) == [1, 1, 3]
