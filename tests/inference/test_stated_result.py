"""One number is said in one way (stated_result.py)."""

from typing import Any

import pytest
from pytest import MonkeyPatch

from modeling_vitcls.inference.metrics import METRICS, Metric
from modeling_vitcls.inference.stated_result import build_metric_table, state_result


def build_metrics(num_right: int, num_images: int, **others: Any) -> dict[str, Any]:
    """Build metrics of images, with an interval of 11 points below and 10 above."""
    accuracy = num_right / num_images
    interval = [accuracy - 0.11, min(accuracy + 0.1, 1.0)]
    counts = {"num_right": num_right, "num_images": num_images}
    return {"accuracy": accuracy, "accuracy_interval": interval, **counts, **others}


CORRECTED = {"accuracy": 0.8335, "accuracy_interval": [0.7199, 0.9252]}
BELOW_ONE = {"accuracy_interval": [0.9962, 1.0]}


@pytest.mark.parametrize(
    ("num_right", "num_images", "others", "expected"),
    [
        (24, 29, {}, "24 of 29 right (95%: 72 to 93%)"),
        (24, 30, {}, "24 of 30 right; about 80% of new photos (69 to 90)"),
        (850, 999, {}, "850 of 999 right; about 85% of new photos (74 to 95)"),
        (8_012, 10_000, {}, "8,012 of 10,000 right; about 80.1% of new photos (69.1 to 90.1)"),
        (66, 80, CORRECTED, "66 of 80 right; about 83% of new photos (72 to 93)"),
        (999, 999, BELOW_ONE, "999 of 999 right; about 100% of new photos (99 to 100)"),
    ],
)
def test_few_photos_have_a_count_others_a_corrected_estimate_and_thousands_decimals(
    num_right: int, num_images: int, others: dict[str, Any], expected: str
) -> None:
    assert state_result(build_metrics(num_right, num_images, **others)) == expected


@pytest.mark.parametrize(
    ("num_shirts", "expected"),
    [
        (60, "; always saying t-shirt: 60 of 80"),
        (68, ", no better than always saying t-shirt: 68 of 80"),
        (41, ""),
    ],
)
def test_the_share_of_guessing_is_said_if_the_sizes_of_the_classes_differ(
    num_shirts: int, expected: str
) -> None:
    sizes = {"skirt": 80 - num_shirts, "t-shirt": num_shirts, "pants": 0}
    rows = [{"name": name, "images": size} for name, size in sizes.items()]
    text = state_result(build_metrics(66, 80, per_class=rows))
    assert text.removeprefix(state_result(build_metrics(66, 80))) == expected


def test_a_mean_over_tasks_is_named_and_counts_no_images() -> None:
    tasks = {"coat": build_metrics(8, 10), "kind": build_metrics(6, 10)}
    results = {"accuracy": 0.7, "num_images": 10, "tasks": tasks}
    rows = [tuple(row.values()) for row in build_metric_table(results)["Metrics"]]
    assert rows[0] == ("mean of the tasks: Accuracy", "70%")
    assert [name for name, _ in rows[1:]] == ["coat: Accuracy", "kind: Accuracy"]


def test_a_metric_that_is_no_share_is_written_as_a_number(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "kappa", Metric("Cohen's kappa", is_share=False))
    values = {"kappa": -0.1234, "kappa_interval": [-0.2, -0.05], "num_images": 50}
    assert state_result(values, "kappa") == "-0.123 (-0.200 to -0.050)"
