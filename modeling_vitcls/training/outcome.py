"""What a run has made and measured: the record in which a run of either kind ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.splits import TrainingData
from ..evaluation.evaluator import Predictions
from ..frozen.scenes import TrainedScenes
from ..inference.intervals import MIN_CORRECTED_IMAGES
from ..inference.metrics import MetricValues
from ..inference.stated_result import Measurement


def list_measurements(
    task_metrics: Mapping[str, MetricValues],
    metric: str,
    seen_by_encoder: int = 0,
    num_folds: int = 0,
) -> list[Measurement]:
    """List the results of all tasks that have labeled images.

    Args:
        task_metrics: metrics of each task (inference/metrics.py).
        metric: of the results.
        seen_by_encoder: number of images of the run that trained its encoder.
        num_folds: number of folds of the cross-validation; 0 for held-out images.
    """
    measured = []
    for task, metrics in task_metrics.items():
        if metrics.get(metric) is None:
            continue
        # The average precision of a handful of images means little.
        is_small = "exact_match" in metrics and metrics["num_images"] < MIN_CORRECTED_IMAGES
        if seen_by_encoder:
            metrics = {
                name: value for name, value in metrics.items() if not name.endswith("_interval")
            }
        own_metric = "exact_match" if is_small else metric
        measured.append(Measurement(task, own_metric, metrics, num_folds))
    return measured


@dataclass(frozen=True)
class Outcome:
    """What a run has made: the metrics of the saved model, and how it came about.

    Attributes:
        data: the images.
        measured: the result of each task; empty if no images measured the model.
        metrics, calibration: fields of results.json.
        split: the images of the metrics, as text.
        num_training_images: number of images that the model was fitted to.
        predictions: content of predictions.parquet, if the images have no several tasks.
        seconds: duration of the fit or of the steps.
        nearest_images: names of the nearest training images of each wrong prediction, by its index.
        num_unreadable: number of training images that could not be read.
        trained_scenes: recognizes photos of the scenes that trained the model, if the encoder can.
        in_trained_scenes: names of the held-out photos that do.
        missing_reason: why nothing could measure the model.
        results: further fields of results.json, such as the number of steps.
        lines: to print about the frozen model and the calibration.
    """

    data: TrainingData
    measured: list[Measurement]
    metrics: MetricValues
    split: str
    num_training_images: int
    calibration: dict[str, Any] | None
    predictions: Predictions | None
    seconds: float
    nearest_images: dict[int, list[str]] | None = None
    num_unreadable: int = 0
    trained_scenes: TrainedScenes | None = None
    in_trained_scenes: Sequence[str] = ()
    missing_reason: str = (
        "no image was held out. Set `held_out_fraction`, such as 0.2 (with few images per class, the "
        "default is 0)"
    )
    results: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, str | None] = field(default_factory=dict)
