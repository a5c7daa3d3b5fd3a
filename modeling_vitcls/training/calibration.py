"""The temperature of a trained classifier.

frozen model          logits of the images that each fold of the cross-validation leaves out
fine-tuned model      logits of the selection images
no selection images   logits of half of the held-out images; the error is reported for the other half
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..evaluation.evaluator import Evaluator, Predictions
from ..frozen.confidence import fit_temperature
from ..frozen.linear_probe import LinearProbe, describe_inference
from ..inference.metrics import compute_calibration_error
from .distributed_state import reshard
from .model import list_last_layers


MIN_IMAGES = 100  # Minimum number of images for a temperature
MIN_ERROR_IMAGES = 100  # With fewer images, a calibration error is mostly noise
# Probabilities below this many times 1 / classes are all the same to a person.
EQUAL_FACTOR = 1.1
# Images that a temperature is fitted to.
CROSS_VALIDATION = "cross-validation"
SELECTION = "selection"
HELD_OUT = "held-out"


@dataclass(frozen=True)
class Calibration:
    """The temperature of a classifier.

    Attributes:
        record: the field "calibration" of results.json; None without a temperature.
        text: what is printed about it.
    """

    record: dict[str, Any] | None
    text: str


@dataclass(frozen=True)
class MeasuredClassifier:
    """A classifier after steps, with its temperature, measured on held-out images.

    Attributes:
        predictions: of the held-out images.
        calibration: the temperature.
        heads_text: which of two heads it returns; None with one head.
    """

    predictions: Predictions
    calibration: Calibration
    heads_text: str | None


def calibrate(
    classifier: Any,
    model: Any,
    held_out: Evaluator,
    selection: Evaluator,
    inference: str | None,
) -> MeasuredClassifier:
    """Calibrate a trained classifier, and measure the held-out images with it.

    A classifier with two heads returns the one, or their mean, that is best on the selection images. The
    temperature becomes a part of the weights of the heads.

    Args:
        classifier: the classifier without wrappers.
        model: the classifier, which may be wrapped, on the device and in evaluation mode.
        held_out: images that did not train it.
        selection: images to fit the temperature to. If they are the held-out images, half of them.
        inference: the `distillation_inference` of the user; None to choose.
    """
    images = HELD_OUT if selection is held_out else SELECTION
    predictions = selection.predict(model)
    heads_text = None
    if classifier.distillation_classifier is not None:
        names = ("cls", "distillation", "mean") if inference is None else (inference,)
        losses = {name: predictions.metrics[f"{name}_loss"] for name in names}
        heads_text = describe_inference(losses, f"of the {images} images")
        inference = min(losses, key=losses.__getitem__)
        if inference != classifier.config.distillation_inference:
            classifier.config.distillation_inference = inference
            predictions = selection.predict(model)
    reshard(model)
    outputs = predictions.outputs
    if selection is held_out:
        # Every second image, not the first half: held-out images are often sorted by class.
        outputs = outputs.take(np.s_[::2])
    num_images = len(outputs.labels)
    record = None
    text = f"not calibrated: {num_images:,} images, {MIN_IMAGES} needed"
    # The temperature comes first: predictions and metrics describe the model as it is saved.
    if num_images >= MIN_IMAGES:
        temperature = round(fit_temperature(outputs.logits, outputs.labels), 4)
        divide_logits(classifier, temperature)
        record = {"temperature": temperature, "num_images": num_images, "images": images}
        text = f"on {num_images:,} {images} images (temperature {temperature:.2f})"
    predictions = held_out.predict(model)
    calibration = measure_errors(Calibration(record, text), predictions)
    return MeasuredClassifier(predictions, calibration, heads_text)


@torch.no_grad()
def divide_logits(classifier: Any, temperature: float) -> None:
    """Divide the logits of a classifier by a temperature, which becomes a part of its weights."""
    for layer in list_last_layers(classifier):
        for weight in layer.parameters():
            weight.div_(temperature)


def describe_fold_calibration(probe: LinearProbe) -> Calibration:
    """Describe the calibration of a probe, whose temperature comes from out-of-fold logits."""
    num_images = int(np.isfinite(probe.losses_).sum())
    chosen = f"on the cross-validated predictions of {num_images:,} training images"
    record = None
    if not num_images:
        text = "not calibrated: too few images for folds, so probabilities mean nothing"
    elif probe.lines_ is not None:
        text = f"each label {chosen}"
    else:
        temperature = round(probe.temperature_, 4)
        record = {"temperature": temperature, "num_images": num_images, "images": CROSS_VALIDATION}
        text = f"{chosen} (temperature {temperature:.2f})"
        # A temperature of nine digits says nothing to a person.
        num_classes = len(probe.classes_)
        if np.nanmax(probe.out_of_fold_) < EQUAL_FACTOR / num_classes:
            text = f"{chosen}, which do not tell the classes apart: all are near 1/{num_classes}"
    return Calibration(record, text)


def measure_errors(calibration: Calibration, predictions: Predictions) -> Calibration:
    """Measure the calibration error before and after the temperature, if there is one.

    The predictions are of held-out images, with the temperature. The error after it becomes their
    metric. The text names the errors unless there are few images.
    """
    record, text = calibration.record, calibration.text
    if record is None:
        return calibration
    outputs = predictions.outputs
    if record["images"] == HELD_OUT:
        outputs = outputs.take(np.s_[1::2])  # The half to which the temperature was not fitted
    # The model divides its logits already; multiplied, they are as before.
    logits = outputs.logits
    before = round(compute_calibration_error(logits * record["temperature"], outputs.labels), 6)
    after = round(compute_calibration_error(logits, outputs.labels), 6)
    predictions.metrics["calibration_error"] = after
    num_images = len(outputs.labels)
    if num_images >= MIN_ERROR_IMAGES:
        text += (
            f"; calibration error of {num_images:,} other images {100 * before:.0f} -> "
            f"{100 * after:.0f} points"
        )
    return Calibration(record | {"calibration_error_before": before}, text)
