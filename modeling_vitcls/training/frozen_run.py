"""A run without steps: the classifiers of the frozen encoder, and how they are measured."""

from dataclasses import dataclass, replace
from typing import Any

from ..data.splits import MAX_CLASS_RATIO, TrainingData
from ..inference.evaluator import Predictions, round_floats
from ..inference.metrics import NOTHING_MEASURED, MetricValues, join_tasks
from .calibration import Calibration, describe_fold_calibration, measure_errors
from .frozen_encoder import describe_frozen, join_texts
from .heads import FrozenHead, describe_class_weights, describe_threshold
from .learning_curve import describe_learning_curve, measure_learning_curve
from .outcome import Outcome, list_measurements
from .plan import RunPlan
from .reporter import Reporter
from .run_inputs import RunInputs
from .whole_scenes import fit_frozen


def run_frozen(inputs: RunInputs, plan: RunPlan, data: TrainingData, reporter: Reporter) -> Outcome:
    """Fit the classifier of each task to every label that is not held out, and measure it."""
    encoder = inputs.frozen_encoder
    assert encoder is not None, "only a run with a frozen encoder can be frozen"
    data, frozen, record, known_scenes = fit_frozen(inputs, plan, data, reporter)
    # Everything below is measured with the heads in the model, which are what the folder will
    # contain.
    encoder.set_frozen(frozen)

    tasks = {task: measure_head(encoder.model, head) for task, head in frozen.items()}
    measured = []
    for task, each in tasks.items():
        measured += list_measurements(
            {task: each.metrics},
            inputs.selection_metric,
            seen_by_encoder=data.count_seen(inputs.encoder_rows),
            num_folds=each.head.probe.num_folds_ if each.head.held_out is None else 0,
        )

    all_tasks = list(tasks.values())
    # Every task has the features of the same pass.
    num_training_images = (
        sum(map(len, data.frozen_parts)) - all_tasks[0].head.features.num_unreadable
    )
    texts = {task: each.calibration.text for task, each in tasks.items()}
    outcome = Outcome(
        data=data,
        measured=measured,
        metrics=NOTHING_MEASURED,
        split=data.held_out_name,
        num_training_images=num_training_images,
        calibration=None,
        predictions=None,
        seconds=record["seconds"],
        known_scenes=known_scenes,
        results={"frozen": record},
        lines={**describe_frozen(record), "calibration": join_texts(texts)},
    )
    if any(each.num_folds for each in measured):
        outcome = replace(outcome, split="cross-validation")
    if data.label_space.kind == "multi_task":
        # Every task has been measured on images of the same passes, but may lack their labels.
        held_out = [each.head.held_out for each in all_tasks if each.head.held_out is not None]
        num_images = num_training_images
        num_unreadable = all_tasks[0].head.features.num_unreadable
        if held_out:
            num_unreadable = held_out[0].num_unreadable
            num_images = len(data.held_out) - num_unreadable
        task_metrics = {task: each.metrics for task, each in tasks.items()}
        metrics = round_floats(join_tasks(task_metrics, num_images))
        return replace(outcome, metrics=metrics | {"num_unreadable_images": num_unreadable})

    (only,) = all_tasks
    curve = measure_learning_curve(only.head)
    lines = outcome.lines | {
        "curve": describe_learning_curve(curve),
        "unknown": describe_threshold(only.head.probe),
    }
    if data.train.class_ratio > MAX_CLASS_RATIO:
        lines["weights"] = describe_class_weights(only.head)
    nearest_images = None
    if only.predictions is not None:
        nearest_images = only.head.find_nearest_images(only.predictions.list_wrong())
    return replace(
        outcome,
        metrics=only.metrics,
        calibration=only.calibration.build_record(),
        predictions=only.predictions,
        nearest_images=nearest_images,
        results=outcome.results | {"learning_curve": curve},
        lines=lines,
    )


@dataclass(frozen=True)
class MeasuredHead:
    """The classifier of a task, and what it says about images that did not train it, if any."""

    head: FrozenHead
    calibration: Calibration
    predictions: Predictions | None

    @property
    def metrics(self) -> MetricValues:
        return NOTHING_MEASURED if self.predictions is None else self.predictions.metrics


def measure_head(model: Any, head: FrozenHead) -> MeasuredHead:
    """Measure a classifier on the held-out images or, without those, by cross-validation.

    In cross-validation, each training image is predicted by a classifier that was not fitted to it,
    and the accuracy is corrected for the choice among the candidates.
    """
    calibration = describe_fold_calibration(head.probe)
    if head.held_out is not None:
        predictions = head.predict_held_out(model)
        return MeasuredHead(head, measure_errors(calibration, predictions), predictions)
    if head.probe.estimate_ is None:
        return MeasuredHead(head, calibration, None)
    # The out-of-fold probabilities contain the temperature already, so there is no error before it.
    return MeasuredHead(head, calibration, head.predict_out_of_fold())
