"""A run without steps: the classifiers of the frozen encoder, and how they are measured."""

from collections.abc import Mapping
from typing import Any

from ..data.splits import MAX_CLASS_RATIO, TrainingData
from ..evaluation.evaluator import Predictions, build_predictions
from ..frozen.curve import describe_learning_curve, measure_learning_curve
from ..frozen.encoder import (
    MAX_START_IMAGES,
    EncodedImages,
    describe_frozen,
    describe_geometry,
    ignore_message,
    join_texts,
    warn_about_unreadable_classes,
)
from ..frozen.heads import FrozenHead, describe_class_weights, describe_threshold
from ..frozen.scenes import describe_scenes
from ..inference.metrics import NOTHING_MEASURED, MetricValues, join_tasks, round_floats
from .calibration import Calibration, describe_fold_calibration, measure_errors
from .plan import RunPlan
from .reporter import Reporter
from .run_inputs import RunInputs
from .run_results import Outcome, list_measurements


def encode_images(inputs: RunInputs, plan: RunPlan, reporter: Reporter) -> EncodedImages:
    """Pass the images that can train the frozen model through the encoder, before they are divided."""
    encoder = inputs.frozen_encoder
    assert encoder is not None, "there is an encoder that is trained"
    warn, max_images = reporter.warn, None
    if plan.kind == "steps":
        # The steps report the unreadable images.
        warn, max_images = ignore_message, MAX_START_IMAGES
    encoded = encoder.encode(plan.images.train, warn, max_images, plan.is_drawn)
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
    encoder = inputs.frozen_encoder
    assert encoder is not None, "only a run with a frozen encoder can be frozen"
    assert images is not None, "a frozen run is not resumed"
    heads, record, trained_scenes, in_trained_scenes = encoder.fit(images, data, reporter.warn)
    # Everything below is measured with the heads in the model, which are what the folder will
    # contain.
    encoder.set_frozen(heads)
    measured = []
    task_metrics = {}
    calibration_texts = {}
    for task, head in heads.items():
        (calibration, text), predictions = measure_head(encoder.model, head)
        calibration_texts[task] = text
        task_metrics[task] = NOTHING_MEASURED if predictions is None else predictions.metrics
        measured += list_measurements(
            {task: task_metrics[task]},
            inputs.selection_metric,
            num_seen=data.count_seen(inputs.encoder_rows),
            num_folds=head.probe.num_folds_ if head.held_out is None else 0,
        )

    # Every task has the features of the same pass.
    features = head.features
    num_training_images = len(data.train) - features.num_unreadable
    lines = describe_frozen(record)
    lines["calibration"] = join_texts(calibration_texts)
    results: dict[str, Any] = {"frozen": record}
    nearest_images = None
    if task == "":  # The only one
        metrics = task_metrics[task]
        if data.train.is_stratified:
            warn_about_unreadable_classes(data, features.labels, reporter.warn)
        results["learning_curve"] = measure_learning_curve(head)
        lines["curve"] = describe_learning_curve(results["learning_curve"])
        lines["unknown"] = describe_threshold(head.probe)
        if data.train.class_ratio > MAX_CLASS_RATIO:
            lines["weights"] = describe_class_weights(head)
        if predictions is not None:
            nearest_images = head.find_nearest_images(predictions.list_wrong())
    else:
        calibration = predictions = None  # Tasks have no common ones
        metrics = join_task_metrics(heads, task_metrics, data)

    is_cross_validated = any(each.num_folds for each in measured)
    return Outcome(
        data=data,
        measured=measured,
        metrics=metrics,
        split="cross-validation" if is_cross_validated else data.held_out_name,
        num_training_images=num_training_images,
        calibration=calibration,
        predictions=predictions,
        seconds=record["seconds"],
        nearest_images=nearest_images,
        num_unreadable=features.num_unreadable,
        trained_scenes=trained_scenes,
        in_trained_scenes=in_trained_scenes,
        missing_reason=inputs.images.missing_reason or explain_missing_result(record["scenes"]),
        results=results,
        lines=lines,
    )


def join_task_metrics(
    heads: Mapping[str, FrozenHead], task_metrics: Mapping[str, MetricValues], data: TrainingData
) -> MetricValues:
    """Join the metrics of tasks, measured on images of the same passes, which may lack their labels."""
    parts = [each.held_out for each in heads.values() if each.held_out is not None]
    images = data.held_out
    if not parts:
        parts = [each.features for each in heads.values()]
        images = data.train
    num_unreadable = parts[0].num_unreadable
    unreadable = {"num_unreadable_images": num_unreadable}
    joined = join_tasks(task_metrics, len(images) - num_unreadable)
    return round_floats(joined | unreadable)  # type: ignore[no-any-return]


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


def measure_head(model: Any, head: FrozenHead) -> tuple[Calibration, Predictions | None]:
    """Measure a classifier on the held-out images or, without those, by cross-validation.

    In cross-validation, each training image is predicted by a classifier that was not fitted to it,
    and the accuracy is corrected for the choice among the candidates.
    """
    calibration = describe_fold_calibration(head.probe)
    if head.held_out is not None:
        predictions = build_predictions(head.labels, head.predict_held_out(model))
        return measure_errors(*calibration, predictions), predictions
    estimate = head.probe.estimate_
    if estimate is None:
        return calibration, None
    # The out-of-fold probabilities contain the temperature already, so there is no error before it.
    out_of_fold = head.predict_out_of_fold()
    return calibration, build_predictions(head.labels, out_of_fold, estimate=estimate)
