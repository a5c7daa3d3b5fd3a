"""The results of the tasks of a run (outcome.py)."""

import pytest

from modeling_vitcls.data.labels import OneLabel, PerTask
from modeling_vitcls.training.outcome import divide_metrics, list_measurements


NAMES = ("accuracy", "mean_average_precision", "cls_accuracy")
ACCURACIES = {
    "accuracy": 0.8,
    "color_accuracy": 0.9,
    "color_num_images": 40,
    "color_accuracy_interval": [0.8, 0.95],
    # No held-out image has a shape.
    "shape_accuracy": None,
    "shape_num_images": 0,
    "shape_accuracy_interval": None,
    "num_images": 50,
}


def test_each_task_is_measured_by_the_images_that_have_its_label() -> None:
    labels = PerTask({"color": ["red", "blue"], "shape": ["round", "square"]})
    (color,) = list_measurements(divide_metrics(ACCURACIES, labels), NAMES)
    assert (color.task, color.metric, color.value) == ("color", "accuracy", 0.9)
    assert color.interval == [0.8, 0.95]
    assert color.num_images == 40
    # Without several tasks, names that begin like a task's are further metrics.
    one_label = OneLabel({"label": ["red", "blue"]})
    (mean,) = list_measurements(divide_metrics(ACCURACIES, one_label), NAMES)
    assert (mean.task, mean.value, mean.num_images) == ("", 0.8, 50)


@pytest.mark.parametrize("metric", ["accuracy", "mean_average_precision"])
def test_images_that_trained_the_encoder_leave_no_interval(metric: str) -> None:
    metrics = {metric: 0.8, "accuracy_interval": [0.7, 0.9], "num_images": 50, "cls_accuracy": 0.7}
    (seen,) = list_measurements({"": metrics}, NAMES, seen_by_encoder=9)
    assert seen.interval is None
    assert seen.seen_by_encoder == 9
    assert seen.others == {"cls_accuracy": 0.7}
    assert list_measurements({"": {"num_images": 0}}, NAMES) == []
    assert "80.00%" in str(seen)
