"""The results of the tasks of a run (run_results.py)."""

import pytest

from modeling_vitcls.training.run_results import list_measurements


TASKS = {
    "color": {"accuracy": 0.9, "num_images": 40, "accuracy_interval": [0.8, 0.95]},
    "shape": {"accuracy": None, "num_images": 0},  # No held-out image has a shape
}


def test_each_task_is_measured_by_the_images_that_have_its_label() -> None:
    (color,) = list_measurements(TASKS, "accuracy")
    assert str(color).startswith("color: 36 of 40 right; about 90% of new photos (80 to 95). ")


@pytest.mark.parametrize("metric", ["accuracy", "mean_average_precision"])
def test_images_that_trained_the_encoder_leave_no_interval(metric: str) -> None:
    metrics = {metric: 0.8, f"{metric}_interval": [0.7, 0.9], "num_images": 50}
    (seen,) = list_measurements({"": metrics}, metric, num_seen=9)
    assert "80%" in seen.statement
    assert "70" not in seen.statement
    assert "without an interval" in seen.method
    assert list_measurements({"": {"num_images": 0}}, metric) == []


@pytest.mark.parametrize(("num_images", "is_corrected"), [(24, False), (80, True)])
def test_a_correction_is_claimed_only_where_it_is_made(num_images: int, is_corrected: bool) -> None:
    metrics = {"accuracy": 0.75, "accuracy_interval": [0.5, 0.9], "num_images": num_images}
    (measured,) = list_measurements({"": metrics}, "accuracy", num_folds=10)
    assert ("corrected for the choice" in str(measured)) == is_corrected
