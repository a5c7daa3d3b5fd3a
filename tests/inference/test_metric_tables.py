"""Tables of measured metrics: their titles, cells and names."""

import pytest

from modeling_vitcls import ViTCLSConfig
from modeling_vitcls.inference.metric_tables import (
    build_class_tables,
    build_confusion_tables,
    build_metric_rows,
    describe_confusions,
    format_small_percent,
    get_metric_names,
)


def test_up_to_20_classes_are_listed_in_one_line_each() -> None:
    """Names are one line of Markdown code. More than 20 classes have no table."""
    values = {"recall": 0.5, "precision": None, "f1": 0.0}
    rows = [{"name": name, "images": 1200} | values for name in ("`a`\n", "x" * 100, "x" * 101)]
    (table,) = build_class_tables({"per_class": rows}, None).values()
    cells = {"Images": "1,200", "Recall": "50.00%", "Precision": "–", "F1": "0.00%"}
    names = ["`'a' `", f"`{'x' * 100}`", f"`{'x' * 99}…`"]

    assert table == [{"Class": name} | cells for name in names]
    assert [
        len(build_class_tables({"per_class": rows[:1] * number}, None)) for number in (0, 20, 21)
    ] == [0, 1, 0]

    config = ViTCLSConfig(
        tasks={"age": ["old", "young"], "size": ["small", "large"]}, num_cls_tokens=2
    )
    tables = build_class_tables({"size_per_class": rows, "age_per_class": rows[:2]}, config)
    assert {title.split(",")[0]: len(rows) for title, rows in tables.items()} == {
        "age": 2,
        "size": 3,
    }

    keys = get_metric_names({"size_accuracy": 0.0, "accuracy": 0.0, "macro_f1": None}, config)
    assert list(keys) == ["accuracy", "size_accuracy"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.00016, "0.016%"), (1e-5, "0.001%"), (0.0, "less than 0.001%")]
)
def test_a_small_cost_is_never_printed_as_zero(value: float, text: str) -> None:
    assert format_small_percent(value) == text


def test_a_calibration_error_has_the_one_that_a_calibrated_model_has_by_chance() -> None:
    results = {"calibration_error": 0.0860, "calibration_error_by_chance": 0.1702}
    ((_, value),) = build_metric_rows(results, None)
    assert value.startswith("8.60%")
    assert "17.02%" in value


def test_the_most_frequent_confusions_come_first() -> None:
    results = {
        "per_class": [{"name": name} for name in ("coat", "shirt", "hat")],
        "confusion_matrix": [[5, 2, 0], [7, 9, 1], [0, 3, 4]],
    }
    (line,) = describe_confusions(results, None)
    assert line.endswith("`shirt` as `coat` (7), `hat` as `shirt` (3), `coat` as `shirt` (2)")


def test_a_confusion_matrix_has_up_to_twelve_classes() -> None:
    for num_classes, num_tables in ((12, 1), (13, 0)):
        results = {
            "per_class": [{"name": str(index)} for index in range(num_classes)],
            "confusion_matrix": [[0] * num_classes] * num_classes,
        }
        assert len(build_confusion_tables(results, None)) == num_tables
        assert describe_confusions(results, None) == []
