"""One row per evaluated image: prediction, probabilities and loss (`evaluate --per-image`).

column          one label per image                     several labels per image
index           index in the split                      same
image           path within the dataset, a checksum, or the row number
label           name                                    list of names
prediction      name                                    list of names with a probability above 0.5
probabilities   list, in the order of the model's labels (calibrated if the model has a temperature)
loss            cross-entropy                           binary cross-entropy, mean over the labels
nearest_images  of a wrong prediction: the training images  -
                with the most similar features

`finetune` writes the same file for its held-out images, predictions.parquet. Only this file has the
column `nearest_images`, and only after a probe of the frozen encoder, whose features are compared.
Several tasks are not supported. The metadata of the file contains the hash of the model's weights,
because predictions of other weights must not be used.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ..data.labels import LabelSpace
from ..runtime.errors import explain_damage
from ..runtime.files import write_atomically
from .evaluator import Evaluator, round_floats
from .image_pass import ImageOutput, stack_rows
from .metrics import SingleLabelMetrics


METADATA_KEY = b"vitcls"


@dataclass(frozen=True)
class Predictions:
    """Labeled images with the logits of a model, as an `Evaluator` keeps them."""

    label_space: LabelSpace
    rows: Sequence[ImageOutput]

    def compute_metrics(self) -> dict[str, Any]:
        """Return the metrics for one label per image (metrics.py)."""
        metrics = SingleLabelMetrics(self.label_space, torch.device("cpu"))
        metrics.update_logits(*map(torch.from_numpy, stack_rows(self.rows)))
        values: dict[str, Any] = round_floats(metrics.compute())
        return values


def write_predictions(
    file: Path,
    evaluator: Evaluator | Predictions,
    weights_hash: dict[str, str] | None,
    nearest_images: Mapping[int, list[str]] | None = None,
) -> None:
    """Write a Parquet file with the columns in the header of this file, for the last evaluation.

    Args:
        file: The file to write.
        evaluator: Its `rows` are the images.
        weights_hash: SHA-256 of each weight file of the model, for the metadata.
        nearest_images: Names of the nearest training images, the nearest first, by the index of the
            image.

    Raises:
        ValueError: Without labeled images.
        OSError: If the file cannot be written.
    """
    import pandas as pd

    names = evaluator.label_space.names
    rows = [row for row in evaluator.rows if is_labeled(row)]
    if not rows:
        raise ValueError("no evaluated image has a label")
    # [N, L]; [N], or [N, L] with several labels per image
    logits, targets = map(torch.from_numpy, stack_rows(rows))

    columns: dict[str, Any] = {
        "index": [row.index for row in rows],
        "image": [row.name for row in rows],
    }
    if evaluator.label_space.kind == "single_label_classification":
        columns |= {
            "label": [names[label] for label in targets.tolist()],
            "prediction": [names[index] for index in logits.argmax(dim=1).tolist()],
            "probabilities": list(logits.softmax(dim=1).numpy()),
            "loss": cross_entropy(logits, targets, reduction="none").numpy(),
        }
        if nearest_images is not None:
            columns["nearest_images"] = [nearest_images.get(row.index, []) for row in rows]
    else:
        losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")  # [N, L]
        columns |= {
            "label": [select_names(names, row) for row in targets],
            "prediction": [select_names(names, row) for row in logits.sigmoid()],
            "probabilities": list(logits.sigmoid().numpy()),
            "loss": losses.mean(dim=1).numpy(),
        }

    table = pa.Table.from_pandas(pd.DataFrame(columns), preserve_index=False)
    metadata = {METADATA_KEY: json.dumps({"weights_sha256": weights_hash})}
    table = table.replace_schema_metadata((table.schema.metadata or {}) | metadata)
    with write_atomically(file) as temporary_file:
        pq.write_table(table, temporary_file)


def read_weights_hash(file: Path) -> dict[str, str] | None:
    """Return the SHA-256 of each weight file of the model that computed a file of predictions.

    It is None if the file does not contain it. Raise ValueError if the file is damaged.
    """
    with explain_damage(file, "Write it again"):
        metadata = pq.read_schema(file).metadata or {}
        if METADATA_KEY not in metadata:
            return None
        return json.loads(metadata[METADATA_KEY])["weights_sha256"]


def get_outputs(evaluator: Evaluator, images: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N, L] and labels [N] of the selected images that have a label.

    The images are those of the last evaluation.
    """
    rows = [row for row in evaluator.rows[images] if is_labeled(row)]
    if not rows:
        return np.zeros((0, 1), np.float32), np.zeros(0, np.int64)
    return stack_rows(rows)


def is_labeled(row: ImageOutput) -> bool:
    """Return whether the label of an image is known."""
    return bool(row.label.ndim or row.label >= 0)


def select_names(names: list[str], values: torch.Tensor) -> list[str]:
    """Return the names whose values are above 0.5."""
    return [name for name, value in zip(names, values.tolist(), strict=True) if value > 0.5]
