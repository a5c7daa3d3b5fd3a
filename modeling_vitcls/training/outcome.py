"""What a run has made and measured: the record in which a run of either kind ends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..inference.evaluator import Predictions
from ..inference.intervals import MIN_CORRECTED_IMAGES
from .reporter import format_metric


# Metrics that are a part of the images, and the words for it if there are few
FRACTIONS = {"accuracy": "{} right", "exact_match": "{} images right with all labels"}


@dataclass(frozen=True)
class Measurement:
    """The result of one task. As text, it is a part of the printed result.

    Attributes:
        task: name of the task; "" if there is only one.
        metric, value: the metric of the result.
        interval: 95% confidence interval [low, high]; None for a metric without one, and for images
            that trained the encoder: their error is larger than any interval says.
        num_images: number of images that measured the task.
        seen_by_encoder: number of images of the run that trained its encoder.
        num_folds: number of folds of the cross-validation; 0 for held-out images.
        num_candidates: number of candidates among which the cross-validation chose.
        others: further metrics of the same images.
    """

    task: str
    metric: str
    value: float
    interval: list[float] | None
    num_images: int
    seen_by_encoder: int = 0
    num_folds: int = 0
    num_candidates: int = 0
    others: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        texts = [self.format_value(), *(format_metric(*item) for item in self.others.items())]
        text = f"{self.task} {', '.join(texts)}".lstrip()
        if not self.num_folds:
            return f"{text} on {self.num_images:,} held-out images"
        if self.num_images < MIN_CORRECTED_IMAGES:
            return f"{text} in cross-validation"
        correction = ""
        if self.metric == "accuracy":
            correction = f", corrected for the choice among {self.num_candidates} candidates"
        return (
            f"{text}, estimated by {self.num_folds}-fold cross-validation on {self.num_images:,} images"
            f"{correction}"
        )

    def format_value(self) -> str:
        """Format the value with its interval; with few images, as a fraction without a percentage."""
        is_small = self.metric in FRACTIONS and self.num_images < MIN_CORRECTED_IMAGES
        text = format_metric(self.metric, self.value)
        if is_small:
            text = f"{round(self.value * self.num_images)} of {FRACTIONS[self.metric].format(self.num_images)}"
        if self.seen_by_encoder:
            return f"{text} (no interval)"
        if self.interval is None:
            return text
        low, high = (100 * bound for bound in self.interval)
        if is_small:
            return f"{text} (95%: {low:.0f} to {high:.0f}%)"
        return f"{text} (95% interval: {low:.1f} to {high:.1f})"


def list_measurements(
    task_metrics: Mapping[str, dict[str, Any]], names: tuple[str, ...], **details: Any
) -> list[Measurement]:
    """List the results of all tasks that have labeled images.

    Args:
        task_metrics: metrics of each task (inference/metrics.py).
        names: metrics of a result, the most important one first; a result may lack some.
        details: other attributes of the measurements.
    """
    measured = []
    for task, metrics in task_metrics.items():
        # The average precision of a handful of images means little.
        is_small = "exact_match" in metrics and metrics["num_images"] < MIN_CORRECTED_IMAGES
        own_names = ("exact_match",) if is_small else names
        values = {name: value for name in own_names if (value := metrics.get(name)) is not None}
        if not values:
            continue
        metric, *others = values
        interval = metrics.get(f"{metric}_interval")
        measured.append(
            Measurement(
                task,
                metric,
                values[metric],
                interval=None if details.get("seen_by_encoder") else interval,
                num_images=metrics["num_images"],
                others={name: values[name] for name in others},
                **details,
            )
        )
    return measured


@dataclass(frozen=True)
class Outcome:
    """What a run has made: the metrics of the saved model, and how it came about.

    Attributes:
        measured: the result of each task; empty if no images measured the model.
        metrics, calibration: fields of results.json.
        split: the images of the metrics, as text.
        num_training_images: number of images that the model was fitted to.
        predictions: content of predictions.parquet, if the images have no several tasks.
        seconds: duration of the fit or of the steps.
        nearest_images: names of the nearest training images of each wrong prediction, by its index.
        num_unreadable: number of training images that were replaced with others.
        results: further fields of results.json, such as the number of steps.
        lines: to print about the frozen model and the calibration.
    """

    measured: list[Measurement]
    metrics: dict[str, Any]
    split: str
    num_training_images: int
    calibration: dict[str, Any] | None
    predictions: Predictions | None
    seconds: float
    nearest_images: dict[int, list[str]] | None = None
    num_unreadable: int = 0
    results: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, str | None] = field(default_factory=dict)
