"""A run without steps: the classifiers of the frozen encoder, and how they are measured."""

from collections.abc import Callable
from dataclasses import replace

from ..data.aspect_ratio import get_output_size
from ..data.splits import MAX_CLASS_RATIO, TrainingData
from ..inference.evaluator import Predictions
from ..inference.metrics import NOTHING_MEASURED, merge_tasks
from .border import describe_border, measure_border
from .calibration import Calibration, describe_probe_calibration, measure_errors
from .outcome import Outcome, list_measurements
from .probe import (
    FrozenModel,
    Probe,
    describe_class_weights,
    describe_frozen,
    describe_threshold,
    join_texts,
)
from .training_setup import TrainingSetup


def run_frozen(
    setup: TrainingSetup, data: TrainingData, num_seen: int, warn: Callable[[str], None]
) -> Outcome:
    """Fit the classifier of each task to every label that is not held out, and measure it.

    `num_seen` is the number of measured images that trained the encoder earlier.
    """
    probe = setup.probe
    assert probe is not None, "only a run with a probe can be frozen"
    # The labels of a validation split are free to train the classifier. The test split still
    # measures it.
    frozen, record = probe.fit(data.frozen_parts, data.held_out, warn)
    # Everything below is measured with the heads in the model, which are what the folder will
    # contain.
    probe.set_frozen(frozen)

    measured = []
    task_metrics = {}
    texts = {}
    for task, model in frozen.items():
        predictions, calibration = measure_task(probe, task, model)
        metrics = NOTHING_MEASURED if predictions is None else predictions.metrics
        measured += list_measurements(
            {task: metrics},
            setup.result_metrics,
            seen_by_encoder=num_seen,
            num_folds=model.probe.num_folds_ if model.held_out is None else 0,
            num_candidates=len(model.probe.table_),
        )
        task_metrics[task] = metrics
        texts[task] = calibration.text

    num_training_images = sum(map(len, data.frozen_parts)) - model.features.num_unreadable
    is_cross_validated = any(each.num_folds for each in measured)
    outcome = Outcome(
        measured=measured,
        metrics=metrics,
        split="cross-validation" if is_cross_validated else data.held_out_name,
        num_training_images=num_training_images,
        calibration=calibration.build_record(),
        predictions=predictions,
        seconds=record["seconds"],
        results={"frozen": record},
        lines={**describe_frozen(record), "calibration": join_texts(texts)},
    )
    if data.label_space.kind == "multi_task":
        merged = merge_tasks(task_metrics, len(data.held_out) or num_training_images)
        merged["num_unreadable_images"] = metrics["num_unreadable_images"]
        return replace(outcome, metrics=merged, calibration=None, predictions=None)

    config = probe.model.config
    size = get_output_size(probe.processor, config.image_height_width)
    border = measure_border(model, config.get_grid_size(size))
    if border is not None:
        record["border"] = border
    lines = outcome.lines | {
        "border": describe_border(border),
        "unknown": describe_threshold(model.probe),
    }
    if data.train.class_ratio > MAX_CLASS_RATIO:
        lines["weights"] = describe_class_weights(model)
    nearest_images = None
    if predictions is not None:
        nearest_images = model.find_nearest_images(predictions.list_wrong())
    return replace(outcome, nearest_images=nearest_images, lines=lines)


def measure_task(
    probe: Probe, task: str, model: FrozenModel
) -> tuple[Predictions | None, Calibration]:
    """Measure a classifier on the held-out images or, without those, by cross-validation.

    In cross-validation, each training image is predicted by a classifier that was not fitted to it,
    and the accuracy is corrected for the choice among the candidates.
    """
    calibration = describe_probe_calibration(model.probe)
    if model.held_out is not None:
        predictions = probe.predict_held_out(task, model)
        return predictions, measure_errors(calibration, predictions)
    if model.estimate is None:
        return None, calibration
    # The out-of-fold probabilities contain the temperature already, so there is no error before it.
    return model.predict_out_of_fold(), calibration
