"""A run without steps: the classifiers of the frozen encoder, and how they are measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..data.splits import TrainingData
from ..evaluation.evaluator import Predictions, measure_left_out
from ..frozen.head_search import (
    MAX_START_IMAGES,
    EncodedImages,
    describe_frozen,
    describe_geometry,
    ignore_message,
    join_texts,
    warn_about_unreadable_classes,
)
from ..frozen.heads import FrozenHead
from ..frozen.scenes import describe_scenes
from ..inference.metrics import (
    NOTHING_MEASURED,
    MetricValues,
    join_tasks,
    round_floats,
)
from .calibration import Calibration, describe_fold_calibration, measure_errors
from .plan import RunPlan
from .reporter import Reporter
from .run_inputs import RunInputs
from .run_results import Outcome, list_measurements


@dataclass(frozen=True)
class MeasuredHead:
    """The classifier of a task, and its predictions of images that did not train it.

    Attributes:
        head: the classifier.
        calibration: its temperature.
        predictions: of the held-out images or out of fold; None if no image could be left out.
    """

    head: FrozenHead
    calibration: Calibration
    predictions: Predictions | None

    @property
    def metrics(self) -> MetricValues:
        return NOTHING_MEASURED if self.predictions is None else self.predictions.metrics


def encode_images(inputs: RunInputs, plan: RunPlan, reporter: Reporter) -> EncodedImages:
    """Pass the images that can train the frozen model through the encoder, before they are divided."""
    search = inputs.head_search
    assert search is not None, "there is an encoder that is trained"
    warn, max_images = reporter.warn, None
    if plan.kind == "steps":
        # The steps report the unreadable images.
        warn, max_images = ignore_message, MAX_START_IMAGES
    encoded = search.encode(plan.images.train, warn, max_images, plan.is_drawn)
    reporter.print_lines(
        {
            "resize": describe_geometry(encoded.record),
            "scenes": describe_scenes(encoded.record["scenes"]),
        }
    )
    return encoded


def run_frozen(
    inputs: RunInputs, data: TrainingData, images: EncodedImages | None, reporter: Reporter
) -> Outcome:
    """Fit the classifier of each task to every label that is not held out, and measure it."""
    search = inputs.head_search
    assert search is not None, "only a run with a frozen encoder can be frozen"
    assert images is not None, "a frozen run is not resumed"
    fitted = search.fit(images, data, reporter.warn)
    search.set_heads(fitted.by_task)
    by_task = {task: measure_head(head) for task, head in fitted.by_task.items()}
    only = by_task.get("")  # Several tasks have no common results
    if inputs.options.answers and only is not None and only.predictions is not None:
        only.metrics.update(data.build_counted_record())
    measured = []
    for task, each in by_task.items():
        measured += list_measurements(
            {task: each.metrics},
            inputs.selection_metric,
            num_seen=data.count_seen(inputs.encoder_rows),
            num_folds=each.head.num_folds,
        )

    record = fitted.record
    fitted.examine(data, is_result=True)
    lines = describe_frozen(record)
    lines["calibration"] = join_texts(
        {task: each.calibration.text for task, each in by_task.items()}
    )
    results: dict[str, Any] = {"frozen": record}
    calibration = predictions = None
    if only is None:
        metrics = join_task_metrics(by_task, data)
    else:
        metrics = only.metrics
        calibration = only.calibration.record
        predictions = only.predictions
        if data.train.is_stratified:
            warn_about_unreadable_classes(data, only.head.features.labels, reporter.warn)

    # Every task has the features of the same pass.
    num_unreadable = next(iter(by_task.values())).head.features.num_unreadable
    is_cross_validated = any(each.num_folds for each in measured)
    return Outcome(
        data=data,
        measured=measured,
        metrics=metrics,
        split="cross-validation" if is_cross_validated else data.held_out_name,
        num_training_images=len(data.train) - num_unreadable,
        calibration=calibration,
        predictions=predictions,
        seconds=record["seconds"],
        num_unreadable=num_unreadable,
        trained_scenes=fitted.trained_scenes,
        in_trained_scenes=fitted.in_trained_scenes,
        missing_reason=inputs.images.missing_reason or explain_missing_result(record["scenes"]),
        results=results,
        lines=lines,
    )


def join_task_metrics(by_task: Mapping[str, MeasuredHead], data: TrainingData) -> MetricValues:
    """Join the metrics of tasks, measured on images of the same passes, which may lack their labels."""
    heads = [each.head for each in by_task.values()]
    parts = [head.held_out for head in heads if head.held_out is not None]
    images = data.held_out
    if not parts:
        parts = [head.features for head in heads]
        images = data.train
    num_unreadable = parts[0].num_unreadable
    task_metrics = {task: each.metrics for task, each in by_task.items()}
    joined = join_tasks(task_metrics, len(images) - num_unreadable)
    joined["num_unreadable_images"] = num_unreadable
    return round_floats(joined)  # type: ignore[no-any-return]


def explain_missing_result(scenes: Mapping[str, Any]) -> str:
    """Say why no fold could measure a classifier, given the record of the scenes."""
    if not scenes["num_joined"]:
        return (
            "cross-validation requires two images, in different groups, of two labels. Add images"
        )
    first, second = scenes["pairs"][0]
    return (
        f"{scenes['num_joined']:,} photos share a scene with another one, such as {first} and {second}, and too few "
        "scenes measure one another. Add photos of another scene to each label"
    )


def measure_head(head: FrozenHead) -> MeasuredHead:
    """Measure a classifier on the held-out images or, without those, by cross-validation."""
    calibration = describe_fold_calibration(head.probe)
    predictions = measure_left_out(head)
    # The out-of-fold probabilities contain the temperature already, so there is no error before it.
    if predictions is not None and head.held_out is not None:
        calibration = measure_errors(calibration, predictions)
    return MeasuredHead(head, calibration, predictions)
