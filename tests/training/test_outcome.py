"""The results of the tasks of a run (outcome.py)."""

import pytest

from modeling_vitcls.training.outcome import list_measurements


NAMES = ("accuracy", "mean_average_precision", "cls_accuracy")
TASKS = {
    "color": {"accuracy": 0.9, "num_images": 40, "accuracy_interval": [0.8, 0.95]},
    "shape": {"accuracy": None, "num_images": 0},  # No held-out image has a shape
}


def test_each_task_is_measured_by_the_images_that_have_its_label() -> None:
    (color,) = list_measurements(TASKS, NAMES)
    assert (color.task, color.metric, color.value) == ("color", "accuracy", 0.9)
    assert color.interval == [0.8, 0.95]
    assert color.num_images == 40


@pytest.mark.parametrize("metric", ["accuracy", "mean_average_precision"])
def test_images_that_trained_the_encoder_leave_no_interval(metric: str) -> None:
    metrics = {metric: 0.8, "accuracy_interval": [0.7, 0.9], "num_images": 50, "cls_accuracy": 0.7}
    (seen,) = list_measurements({"": metrics}, NAMES, seen_by_encoder=9)
    assert seen.interval is None
    assert seen.seen_by_encoder == 9
    assert seen.others == {"cls_accuracy": 0.7}
    assert list_measurements({"": {"num_images": 0}}, NAMES) == []
    assert "80.00%" in str(seen)
