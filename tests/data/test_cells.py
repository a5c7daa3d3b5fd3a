"""Cells of a label column: integers, text and lists, declared or not, with and without class names."""

import math
from collections.abc import Callable
from typing import Any

import datasets
import pytest
from helpers.tiny_models import raises_one_line
from pytest import LogCaptureFixture

from modeling_vitcls.data.cells import name_items
from modeling_vitcls.data.columns import read_labels
from modeling_vitcls.data.labels import OneLabel


def read(
    values: list[Any],
    feature: Any = None,
    names: tuple[str, ...] | None = None,
    dataset: str = "table.csv",
    **flags: Any,
) -> tuple[list[str], Any]:
    """Return the classes and the labels of a column with these values."""
    features = None if feature is None else datasets.Features({"label": feature})
    table = datasets.Dataset.from_dict({"label": values}, features)
    space, labels = read_labels({"train": table}, ["label"], dataset, label_names=names, **flags)
    return space.names, list(labels["train"])


def test_an_index_of_a_declared_column_is_never_a_name() -> None:
    found = name_items({"0": [0], "7": [7]}, ["no", "7"], is_declared=True, has_vectors=False)
    space = OneLabel({"label": ["no", "7"]})
    with raises_one_line("row 1 has the label 'index 7', not one of the 2 classes"):
        space.index({"label": list(found.values())}, "table.csv")


def test_undeclared_integers_are_names_sorted_by_value() -> None:
    assert read([10, 9, 100, None]) == (["9", "10", "100"], [1, 0, 2, None])
    assert read([10.0, 9.0]) == (["9", "10"], [1, 0])


def test_text_with_a_decimal_zero_is_the_integer_beside_it() -> None:
    """pandas writes 1 as 1.0 into the CSV file of a split in which a cell is empty."""
    assert read(["1", "2.0", "1.0", "2"]) == (["1", "2"], [0, 1, 0, 1])
    assert read(["1.0", "2.0"])[0] == ["1.0", "2.0"]  # versions


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


@pytest.mark.parametrize(
    "build", [datasets.List, datasets.LargeList, datasets.Sequence, lambda feature: [feature]]
)
def test_each_type_of_list_contains_several_labels(build: Callable[[Any], Any]) -> None:
    declared = build(datasets.ClassLabel(names=["1", "0"]))
    assert read([[1], [1, 0], []], declared) == (["1", "0"], [[1], [0, 1], []])
    assert read([["b"], ["a"]], build(datasets.Value("string")))[0] == ["a", "b"]


# Lists --------------------------------------------------------------------------------------------


def test_lists_of_json_and_python_are_read() -> None:
    values = ['["a", null]', "['b', 'a']", "[null]", "", ' ["b"] ', "('a',)", "{'a', 'b'}"]
    assert read(values) == (["a", "b"], [[0], [0, 1], None, None, [1], [0], [0, 1]])
    assert read(["(other)", "(a, b)", "{}"])[0] == ["(a, b)", "(other)", "{}"]
    assert read(["[true, false]", "[false, true]"], names=("a", "b"))[1] == [[0], [1]]


def test_objects_with_a_choice_or_a_name_are_labels() -> None:
    """Label Studio writes choices as text into CSV files, pandas and WebDataset write objects."""
    choices = ['{"choices": ["red", "cat"]}', "red", "{'choices': ['dog']}"]
    assert read(choices) == (["cat", "dog", "red"], [[0, 2], [2], [1]])
    objects = [{"id": 3, "name": "dog"}, {"id": 5, "name": "cat"}, {"id": None, "name": None}]
    assert read(objects) == (["cat", "dog"], [1, 0, None])
    assert read([[objects[0], objects[1]], [objects[0]]]) == (["cat", "dog"], [[0, 1], [1]])
    with raises_one_line("it is not clear which field", "`label_column='label.id'`"):
        read(['{"id": 3, "title": "dog"}'])


@pytest.mark.parametrize("odd", ["[a, c]", "['a' 'b']", "[a b]"])
def test_a_text_in_brackets_among_lists_is_an_error_with_its_row(odd: str) -> None:
    for others in (['["a"]', '["b", "a"]'], [odd]):
        with raises_one_line("row 1 has" if len(others) == 2 else "row 0 has", "JSON"):
            read([others[0], odd, others[-1]])
    assert read([odd, "a", "b"])[0] == sorted([odd, "a", "b"])  # an unusual name


VECTORS = [[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("odd", [[1, 0], [0, 1, 0, 0], [1, None, 0], [1, 2, 0], [], [1]])
def test_a_vector_of_another_length_or_number_is_an_error_with_its_row(odd: list[Any]) -> None:
    for values in ([*VECTORS, odd], list(map(str, [*VECTORS, [1, 0, 1], odd]))):
        with raises_one_line(f"row {len(values) - 1} has", "each of the 3 classes"):
            read(values, names=("a", "b", "c"))
    assert read([*VECTORS, None], names=("a", "b", "c"))[1] == [[0], [1], [1, 2], [], None]
    with raises_one_line("3 places with 0 or 1", "`label_names`"):
        read(VECTORS)


def test_lists_of_indices_are_no_vectors() -> None:
    for lists, names, labels in (
        ([[0, 1], [2], [1, 2], [0]], "abc", [[0, 1], [2], [1, 2], [0]]),
        # One box per object: an index may be repeated, but most lists have others.
        ([[1, 1], [2], [1, 2], [0]], "abc", [[1], [2], [1, 2], [0]]),
        ([[0], [0, 1], [1], [0]], "ab", [[0], [0, 1], [1], [0]]),
    ):
        assert read(lists, names=tuple(names))[1] == labels


def test_lists_of_declared_indices_are_vectors_only_if_one_repeats_a_number() -> None:
    declared = datasets.List(datasets.ClassLabel(names=["a", "b"]))
    assert read([[0, 1], [0, 1], [0, 1]], declared)[1] == [[0, 1]] * 3
    assert read([[0, 1], [1, 1], [0, 0]], declared)[1] == [[1], [0, 1], []]


# Separators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["|", ";", ",", ", "])
def test_texts_whose_parts_repeat_more_often_have_several_labels(
    separator: str, caplog: LogCaptureFixture
) -> None:
    tags = [("dress", "warm"), ("dress", "cold"), ("top", "warm"), ("top",), ("warm", "top")]
    values = list(map(separator.join, tags))
    names, labels = read(values, dataset=f"{separator}.csv")
    assert names == ["cold", "dress", "top", "warm"]
    assert labels == [[1, 3], [0, 1], [2, 3], [2], [2, 3]]
    assert "`label_separator='none'`" in caplog.text
    assert read(values, separator="none")[0] == sorted(values)


def test_texts_whose_parts_are_not_repeated_are_classes(caplog: LogCaptureFixture) -> None:
    species = ["tench, Tinca tinca", "goldfish, Carassius auratus", "crane, bird", "crane, machine"]
    for values in (species, ["a b", "a c", "b c"], ["Doe, Jane", "Doe, John"]):
        assert read(values)[0] == sorted(values)
    assert not caplog.text
    assert read(["red|round", "blue|long"] * 2)[0] == ["blue|long", "red|round"]
    assert "2 classes such as 'blue|long'" in caplog.text
    assert caplog.text.count("`label_separator='|'`") == 1
    wrong = read(["red|round", "blue|long"], dataset="wrong.csv", separator=";")[0]
    assert wrong == ["blue|long", "red|round"]
    assert caplog.text.count("`label_separator='|'`") == 2
    read(["dress, body", "dress, head", "shirt, body"] * 9)
    assert "1 classes such as 'dress, body'" in caplog.text
    assert read(["x|y", "x|z"], names=("x|z", "x|y"))[1] == [1, 0]


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.5, 1000], ["0,5", "1,5", "2,5", "1,2"]])
def test_a_decimal_number_looks_like_a_measurement(values: list[Any]) -> None:
    words = f"decimal numbers such as {values[0]}: this looks like a measurement"
    with raises_one_line(words, "`label_column`", "`label_names`"):
        read(values)
    names = tuple(map(str, values))
    assert read(values, names=names)[1] == list(range(len(values)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (range(0, 153, 3), "51 different numbers such as 102: this looks like a measurement"),
        (range(100), ""),
        (range(1, 101), ""),
        ([-1, 0, 1], "the class -1. If it means that an image has no label"),
        (["-1.0", "0.0"], "the class -1.0. If"),
        ([-100, 1, 2], "the class -100. If"),
        ([-1, 1], "write 0"),
    ],
)
def test_whole_numbers_that_may_be_no_classes_are_classes_with_a_warning(
    values: Any, words: str, caplog: LogCaptureFixture
) -> None:
    assert len(read(list(values), dataset=f"{values}.csv")[0]) == len(values)
    assert words in caplog.text
    assert bool(words) == ("WARNING" in caplog.text)
