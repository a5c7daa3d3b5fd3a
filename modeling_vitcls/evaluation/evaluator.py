"""Metrics of a model on labeled images.

Each image is counted exactly once with any number of processes.

The pass over the images is in image_pass.py, the metrics are in metrics.py, and evaluate.py
evaluates a saved model and writes the results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..data.batches import MAX_CACHE_BYTES
from ..data.labels import LabelSpace, OneLabel, PerTask
from ..frozen.heads import FrozenHead
from ..frozen.targets import Target, find_target
from ..hub.model_files import PREDICTIONS_FILE
from ..hub.model_folder import ModelFolder
from ..inference.image_pass import ImageOutputs, ImagePass
from ..inference.intervals import compute_proportion_interval
from ..inference.metrics import (
    NOTHING_MEASURED,
    MetricValues,
    compute_losses,
    measure,
    round_floats,
    select_scalars,
)
from ..inference.prediction_rows import DEFAULT_THRESHOLD
from ..inference.stated_result import state_result
from ..model.heads_vitcls import IGNORED_LABEL
from ..runtime.errors import warn_on_first_process
from ..runtime.files import check_parquet_size, write_atomically


@dataclass(frozen=True)
class Predictions:
    """Logits of a model for the readable images that have a label, and their metrics.

    They are the same on every process.
    """

    label_space: LabelSpace
    outputs: ImageOutputs
    metrics: MetricValues
    threshold: float  # The probability from which one of several labels is predicted
    # Losses of images, by index, with interventions on special tokens (token_effects.py)
    token_losses: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def target(self) -> Target:
        """What an image has of the labels: one, or several. Several tasks have one each."""
        return find_target(self.outputs.labels)

    @property
    def answers(self) -> np.ndarray:
        """The predicted classes [N] or, with several labels per image, a mask [N, L]."""
        return self.target.predict(self.outputs.logits, self.threshold)


def build_predictions(
    label_space: LabelSpace,
    outputs: ImageOutputs,
    threshold: float = DEFAULT_THRESHOLD,
    estimate: MetricValues | None = None,
) -> Predictions:
    """Measure logits (metrics.py). The arguments are as in `measure`.

    An estimate that is corrected for the choice among candidates replaces what is counted.
    In the metrics, numbers come before lists and dicts, and the first number is the metric for
    comparing models. `num_unreadable_images` is the number of unreadable images, which `num_images`
    excludes. Floats are rounded to six decimals.
    """
    outputs = replace(outputs, features=None)  # They would stay in memory with the predictions
    values = measure(label_space, outputs.logits, outputs.labels, threshold, outputs.groups)
    unreadable = {"num_unreadable_images": outputs.num_unreadable}
    metrics = round_floats(select_scalars(values) | unreadable | values | (estimate or {}))
    if isinstance(label_space, OneLabel):
        outputs = outputs.take(outputs.labels != IGNORED_LABEL)
        # Without the logits of two heads, which follow the returned ones
        outputs = replace(outputs, logits=outputs.logits[:, : len(label_space.names)])
    return Predictions(label_space, outputs, metrics, threshold)


def measure_left_out(head: FrozenHead) -> Predictions | None:
    """Measure a classifier on the held-out images or, without those, by cross-validation, if it has folds.

    In cross-validation, the accuracy is corrected for the choice among the candidates.
    """
    if head.held_out is not None:
        return build_predictions(head.labels, head.predict_held_out())
    estimate = head.probe.estimate_
    if estimate is None:
        return None
    return build_predictions(head.labels, head.predict_out_of_fold(), estimate=estimate)


def count_in_trained_scenes(indices: Sequence[int], predictions: Predictions) -> dict[str, Any]:
    """Count photos of scenes of the training photos, by their indices, and the others that are right."""
    outputs = predictions.outputs
    is_known = np.isin(outputs.indices, indices)  # Photos without a label have no row
    record: dict[str, Any] = {
        "names": outputs.names[is_known].tolist(),
        "num_images": len(outputs.names),
    }
    others = outputs.take(~is_known)
    number = len(others.indices)
    if isinstance(predictions.label_space, PerTask) or not number:
        return record
    is_right = predictions.target.find_right(predictions.answers, outputs.labels)
    num_right = int(is_right[~is_known].sum())
    return record | {
        "others": {
            "accuracy": num_right / number,
            "accuracy_interval": compute_proportion_interval(num_right, number, others.groups),
            "num_images": number,
        }
    }


def describe_in_trained_scenes(record: Mapping[str, Any]) -> str | None:
    """Say how many photos are of scenes of the training photos, and how many others are right."""
    names = record.get("names")
    if not names:
        return None
    text = (
        f"{len(names):,} of {record['num_images']:,} photos are of scenes that the model was trained "
        f"on, such as {names[0]}, and easier than new photos"
    )
    if others := record.get("others"):
        text += f". The others: {state_result(others)}"
    return text


class Evaluator(ImagePass):
    """Evaluates models on a fixed set of labeled images. It takes the arguments of `ImagePass`."""

    pass_name = "evaluating"
    max_cache_bytes = MAX_CACHE_BYTES

    def __call__(self, model: nn.Module) -> MetricValues:
        """Measure a model; without images, there are only their numbers."""
        if not len(self.images):
            return NOTHING_MEASURED
        return self.predict(model).metrics

    def predict(self, model: nn.Module, is_mirrored: bool = False) -> Predictions:
        """Measure a model on the device in evaluation mode, and keep the logits.

        All processes must call this method.

        Args:
            model: the classifier.
            is_mirrored: whether the model gets mirror images.

        Raises:
            ValueError: if all images are unreadable, if more than `MAX_UNREADABLE_IMAGES` images
                are unreadable, or if the outputs of the model for any image are not finite.
        """

        def compute(pixel_values: Tensor) -> dict[str, Tensor]:
            pixel_values = pixel_values.flip(-1) if is_mirrored else pixel_values
            return {"logits": select_logits(self.label_space, model(pixel_values))}

        return build_predictions(self.label_space, self.collect(model, compute))


def select_logits(label_space: LabelSpace, outputs: Any) -> Tensor:
    """Select the logits [B, L] that `measure` expects; the logits of both heads are appended."""
    if isinstance(outputs.logits, dict):
        return torch.cat(list(outputs.logits.values()), dim=1)
    heads = [outputs.cls_logits, outputs.distillation_logits]
    # Both heads are measured only for one label per image, and neither has added classes.
    has_one_label = isinstance(label_space, OneLabel)
    if heads[1] is None or not has_one_label or heads[1].shape != outputs.logits.shape:
        return outputs.logits  # type: ignore[no-any-return]
    return torch.cat([outputs.logits, *heads], dim=1)


# One row per evaluated image ----------------------------------------------------------------------

# Prediction, probabilities and loss (`evaluate --per-image`).
#
# column          one label per image                     several labels per image
# index           index in the split                      same
# image           path within the dataset, a checksum, or the row number
# label           name                                    list of names
# prediction      name                                    list of names whose probability is at least the threshold
# probabilities   list, in the order of the model's labels (calibrated if the model has a temperature)
# loss            cross-entropy                           binary cross-entropy, mean over the labels
# group           number of its group: its copies, shots of its scene,    same
#                 and what the person has named
# loss_hidden_*,  of `finetune`: the loss with a group of tokens hidden,  same
# loss_content_*  or with another photo's (evaluation/token_effects.py)
#
# `finetune` writes the same file for its held-out images, predictions.parquet; `add-task` and
# `add-class` write it for the images that were left out. Several tasks are not supported. The metadata of the
# file contains the hash of the model's weights, because predictions of other weights must not be used.


def build_rows(predictions: Predictions) -> pd.DataFrame:
    """Build the columns above from the logits of all images."""
    names = predictions.label_space.names
    outputs = predictions.outputs
    target = predictions.target
    columns: dict[str, Any] = {
        "index": outputs.indices,
        "image": outputs.names,
        "label": target.get_names(names, outputs.labels),
        "prediction": target.get_names(names, predictions.answers),
        "probabilities": list(target.to_probabilities(outputs.logits)),
        "loss": compute_losses(outputs.logits, outputs.labels),
        "group": outputs.groups,
    }
    return pd.DataFrame(columns).join(predictions.token_losses, on="index")


def write_rows(file: Path, rows: pd.DataFrame, weights_hash: dict[str, str] | None) -> None:
    """Write the rows to a Parquet file, with the SHA-256 of each weight file of the model.

    Raises:
        OSError: if the file cannot be written.
    """
    rows.attrs["weights_sha256"] = weights_hash  # Pandas writes it to the metadata of the file
    with write_atomically(file) as temporary_file:
        rows.to_parquet(temporary_file, index=False)


def read_predictions(folder: ModelFolder) -> pd.DataFrame | None:
    """Read predictions.parquet: one row per image, and `confidence`.

    The result is None if the folder has no predictions of these weights, or the images do not have
    exactly one label.
    """
    file = folder.path / PREDICTIONS_FILE
    if not folder.results or not file.is_file():
        return None
    try:
        check_parquet_size(file)
        rows = pd.read_parquet(file)
    except (OSError, ValueError):  # The errors of pyarrow are subclasses
        warn_on_first_process(
            f"ignoring {file}, because it is not readable. Remove it, or train again with `overwrite`"
        )
        return None
    # A model that was trained again makes other mistakes than those in the file.
    if rows.attrs.get("weights_sha256") != folder.weights_sha256:
        warn_on_first_process(
            f"ignoring {file}, because it contains the predictions of other weights"
        )
        return None
    # Several labels of an image are a list, of which some may be right and others wrong.
    if not len(rows) or not isinstance(rows["label"][0], str):
        return None
    return rows.assign(confidence=rows["probabilities"].map(max))
