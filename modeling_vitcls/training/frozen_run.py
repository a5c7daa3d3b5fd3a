"""A run without steps: the classifier of the frozen encoder, and how it is measured."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..data.splits import MAX_CLASS_RATIO, TrainingData
from ..inference.metrics import NOTHING_MEASURED
from ..runtime.distributed import run_on_main
from .calibration import describe_probe_calibration, measure_errors, select_error_metrics
from .outcome import Outcome, list_measurements
from .probe import describe_frozen, describe_threshold
from .training_setup import TrainingSetup


def run_frozen(
    setup: TrainingSetup, data: TrainingData, num_seen: int, warn: Callable[[str], None]
) -> Outcome:
    """Fit the classifier to every label that is not held out, and measure it.

    Without held-out images, each training image is predicted by a classifier that was not fitted to
    it, and the accuracy is corrected for the choice among the candidates. `num_seen` is the number
    of measured images that trained the encoder earlier.
    """
    probe = setup.probe
    assert probe is not None, "only a run with a probe can be frozen"
    # The labels of a validation split are free to train the classifier. The test split still
    # measures it.
    frozen = probe.fit(data.frozen_parts, data.held_out, warn)
    # Everything below is measured with the heads in the model, which are what the folder will
    # contain.
    probe.set_frozen(frozen)

    calibration = describe_probe_calibration(frozen.probe)
    split = data.held_out_name
    predictions = nearest_images = None
    metrics = NOTHING_MEASURED
    details = {"seen_by_encoder": num_seen}
    if frozen.held_out is not None:
        predictions = probe.predict(frozen, frozen.held_out)
        calibration = measure_errors(calibration, predictions)
        metrics = predictions.metrics | select_error_metrics(calibration.errors)
    elif frozen.estimate is not None:
        split = "cross-validation"
        predictions = probe.predict_out_of_fold(frozen)
        metrics = predictions.metrics
        details |= {
            "num_folds": frozen.record["num_folds"],
            "num_candidates": len(frozen.record["candidates"]),
        }
        # The out-of-fold probabilities contain the temperature already, so there is no error before
        # it.
        calibration = replace(calibration, errors=select_error_metrics(metrics))
    if predictions is not None:
        nearest_images = frozen.find_nearest_images(predictions.list_wrong())
    weights_text = None
    if data.train.class_ratio > MAX_CLASS_RATIO:
        weights_text = run_on_main(partial(probe.compare_class_weights, frozen))
    return Outcome(
        measured=list_measurements(metrics, setup.result_metrics, data.label_space, **details),
        metrics=metrics,
        split=split,
        num_training_images=sum(map(len, data.frozen_parts)) - frozen.features.num_unreadable,
        calibration=calibration.build_record(),
        predictions=predictions,
        nearest_images=nearest_images,
        seconds=frozen.record["seconds"],
        results={"frozen": frozen.record},
        lines={
            **describe_frozen(frozen.record),
            "unknown": describe_threshold(frozen.probe),
            "calibration": calibration.text,
            "weights": weights_text,
        },
    )
