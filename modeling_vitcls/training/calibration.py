"""What is measured with a trained classifier: its temperature and, after steps, new tokens and classes.

frozen model          logits of the images that each fold of the cross-validation leaves out
fine-tuned model      logits of the selection images
no selection images   logits of half of the held-out images; the error is reported for the other half
"""

from functools import partial
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.images import LabeledImages
from ..data.splits import TrainingData
from ..evaluation.evaluator import Evaluator, Predictions
from ..frozen.class_statistics import KNOWN_RECALL, ClassStatistics, Token
from ..frozen.confidence import fit_temperature
from ..frozen.encoder import ignore_message
from ..frozen.features import FeatureLayout, Features, compute_features
from ..frozen.heads import describe_unknown
from ..frozen.linear_probe import (
    MIN_DISTANCE_IMAGES,
    NUM_LAST_LAYERS,
    LinearProbe,
    describe_inference,
)
from ..frozen.scenes import TrainedScenes, measure_limit
from ..inference.metrics import compute_calibration_error
from ..inference.token_names import SINGLE_TOKEN_NAMES
from ..model.attention_masks_vitcls import list_gated_tokens
from ..model.modeling_vitcls import count_output_tokens
from .distributed_state import distribute_like, reshard
from .model import list_last_layers
from .plan import RunPlan
from .run_inputs import RunInputs


MIN_IMAGES = 100  # Minimum number of images for a temperature
MIN_ERROR_IMAGES = 100  # With fewer images, a calibration error is mostly noise
# Probabilities below this many times 1 / classes are all the same to a person.
EQUAL_FACTOR = 1.1
# Images that a temperature is fitted to.
CROSS_VALIDATION = "cross-validation"
SELECTION = "selection"
HELD_OUT = "held-out"


# The field "calibration" of results.json, None without a temperature, and the printed line about it
Calibration = tuple[dict[str, Any] | None, str]


def choose_heads(
    classifier: Any, model: Any, selection: Evaluator, images: str, inference: str | None
) -> tuple[Predictions, str | None]:
    """Predict the selection images; of two heads, let the model return what is best on them.

    Args:
        classifier: the classifier without wrappers.
        model: the classifier, which may be wrapped, on the device and in evaluation mode.
        images: what the selection images are, for the returned line.
        inference: the `distillation_inference` of the user; None to choose.
    """
    config = classifier.config
    predictions = selection.predict(model)
    if classifier.distillation_classifier is None:
        return predictions, None
    names = ("cls", "distillation", "mean") if inference is None else (inference,)
    losses = {name: predictions.metrics[f"{name}_loss"] for name in names}
    inference = min(losses, key=losses.__getitem__)
    if inference != config.distillation_inference:
        config.distillation_inference = inference
        predictions = selection.predict(model)
    return predictions, describe_inference(losses, f"of the {images} images")


def calibrate(
    classifier: Any,
    model: Any,
    held_out: Evaluator,
    selection: Evaluator,
    inference: str | None,
) -> tuple[Calibration, Predictions, str | None]:
    """Calibrate a trained classifier, and measure the held-out images with it.

    Also choose which of two heads it returns, and return a line about that. The temperature becomes
    a part of the weights of the heads.

    Args:
        classifier: the classifier without wrappers.
        model: the classifier, which may be wrapped, on the device and in evaluation mode.
        held_out: images that did not train it.
        selection: images to fit the temperature to. If they are the held-out images, half of them.
        inference: the `distillation_inference` of the user; None to choose.
    """
    images = HELD_OUT if selection is held_out else SELECTION
    predictions, heads_text = choose_heads(classifier, model, selection, images, inference)
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
    return measure_errors(record, text, predictions), predictions, heads_text


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
    return record, text


def measure_errors(
    record: dict[str, Any] | None, text: str, predictions: Predictions
) -> Calibration:
    """Measure the calibration error before and after the temperature, if there is one.

    The predictions are of held-out images, with the temperature. The error after it becomes their
    metric. The text names the errors unless there are few images.
    """
    if record is None:
        return record, text
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
    return record | {"calibration_error_before": before}, text


# New tokens ---------------------------------------------------------------------------------------


@torch.no_grad()
def measure_tokens(
    model: Any,
    prepared_model: nn.Module,
    held_out: Evaluator,
    predictions: Predictions | None,
    plan: RunPlan,
) -> tuple[dict[str, Any], str | None]:
    """Measure what the new tokens of each group are worth: the same images with their gates closed.

    An open gate is no evidence: noise at the rate of new tokens opens gates, too.

    Args:
        model, prepared_model: the trained model, and the same as Accelerate prepared it.
        held_out: images that did not train it.
        predictions: of these images; None without any, or for several tasks.
        plan: of the run.

    Returns:
        The field "tokens" of results.json, and a line for each group; neither without new gated
        tokens or predictions.
    """
    if predictions is None or "vitcls.gates.gates" not in plan.new_tokens:
        return {}, None
    groups = [group for group, _ in list_gated_tokens(model.config)]
    are_new = plan.new_tokens["vitcls.gates.gates"]
    gates = model.vitcls.gates.gates
    trained = gates.clone()
    record = {}
    lines = []
    for group in dict.fromkeys(compress(groups, are_new)):
        is_kept = [
            not is_new or each != group for each, is_new in zip(groups, are_new, strict=True)
        ]
        gates.mul_(distribute_like(torch.tensor(is_kept, dtype=gates.dtype), gates))
        without = held_out.predict(prepared_model)
        reshard(prepared_model)
        gates.copy_(trained)

        is_right, is_right_without = (
            ~np.isin(each.outputs.indices, each.list_wrong()) for each in (predictions, without)
        )
        number = len(is_right)
        loss, loss_without = (each.metrics["loss"] for each in (predictions, without))
        record[group] = {
            "num_images": number,
            "accuracy": float(is_right.mean()),
            "accuracy_without": float(is_right_without.mean()),
            "loss": loss,
            "loss_without": loss_without,
        }
        # An interval of the difference would have no width if no prediction differs.
        lines.append(
            f"the new {SINGLE_TOKEN_NAMES[group]} tokens: {is_right_without.sum()} of {number} right, with "
            f"them {is_right.sum()} ({(is_right & ~is_right_without).sum()} gained, "
            f"{(is_right_without & ~is_right).sum()} lost); log loss {loss_without:.3f}, with them {loss:.3f}"
        )
    return {"tokens": record}, "\n".join(lines)


# Class statistics of a model that was trained with steps ------------------------------------------


MAX_STATISTICS_IMAGES = 5000  # Maximum number of images for the statistics of a trained model


def store_statistics(inputs: RunInputs, data: TrainingData) -> tuple[TrainedScenes | None, str]:
    """Store class statistics in a trained model, from one pass over some of its training images.

    An image is unknown if it is farther away than most images that the model was not trained on.

    Returns:
        What recognizes these training images, if the frozen encoder of the run measures how near they
        are; and the line about images that will be marked as unknown.
    """
    model = inputs.model.eval()
    images = data.train.draw(MAX_STATISTICS_IMAGES)
    features = compute_labeled_features(inputs, images, inputs.processor)
    tokens = select_tokens(model, features)
    statistics = ClassStatistics.fit(tokens, features.labels, model.config.num_labels)
    other_images = data.held_out if data.selection is None else data.selection
    # The threshold comes from images that the model was not trained on: training images lie closer
    # to the means of their classes than any new image does.
    if len(other_images) >= MIN_DISTANCE_IMAGES:
        others = compute_labeled_features(
            inputs, other_images.draw(MAX_STATISTICS_IMAGES), inputs.processor
        )
        distances = statistics.compute_distances(select_tokens(model, others))
        threshold = float(np.quantile(distances, KNOWN_RECALL, method="higher"))
        model.config.distance_threshold = threshold
    statistics.set_in_model(model)
    unknown_text = describe_unknown(
        model.config.distance_threshold, f"{MIN_DISTANCE_IMAGES} held-out images"
    )
    if inputs.frozen_encoder is None:
        return None, unknown_text
    compute = partial(compute_labeled_features, inputs)
    limit = measure_limit(features, images, inputs.processor, compute)
    return TrainedScenes.of(features, limit), unknown_text


def compute_labeled_features(inputs: RunInputs, images: LabeledImages, processor: Any) -> Features:
    """Compute the features of the images that have a label: others (-100) belong to no mean."""
    layout = FeatureLayout.for_extra_heads(inputs.model.config, NUM_LAST_LAYERS)
    # The steps and evaluations have named the unreadable images
    arguments = inputs.pass_arguments | {"warn": ignore_message, "processor": processor}
    features = compute_features(inputs.model, images, layout, **arguments)
    return features.take(features.labels >= 0)


def select_tokens(model: Any, features: Features) -> dict[Token, np.ndarray]:
    """Select the inputs of the class statistics: the features [N, D] of each token."""
    tokens = features.get_tokens()
    # A classifier on CLS skips the patches of the last layer, so at inference they have no
    # distance.
    if count_output_tokens(model.vitcls, {}) is not None:
        del tokens[-1, "mean"]
    return tokens
