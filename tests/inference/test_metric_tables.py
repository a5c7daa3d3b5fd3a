"""Tables of measured metrics: their titles, cells and names."""

import pytest

from modeling_vitcls.inference.metric_tables import (
    build_metric_rows,
    describe_confusions,
    format_small_percent,
)


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
