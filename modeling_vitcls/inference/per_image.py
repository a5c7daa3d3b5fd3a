"""One row per evaluated image: prediction, probabilities and loss (`evaluate --per-image`).

column          one label per image                     several labels per image
index           index in the split                      same
image           path within the dataset, a checksum, or the row number
label           name                                    list of names
prediction      name                                    list of names whose probability is at least the threshold
probabilities   list, in the order of the model's labels (calibrated if the model has a temperature)
loss            cross-entropy                           binary cross-entropy, mean over the labels
nearest_images  of a wrong prediction: the training images  same
                with the most similar features

`finetune` writes the same file for its held-out images, predictions.parquet. Runs that start from a
frozen encoder also write `nearest_images`, found with its features. No other file has this column.
Several tasks are not supported. The metadata of the file contains the hash of the model's weights,
because predictions of other weights must not be used.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ..runtime.files import write_atomically
from .evaluator import Predictions


METADATA_KEY = b"vitcls"


def write_predictions(
    file: Path,
    predictions: Predictions,
    weights_hash: dict[str, str] | None,
    nearest_images: Mapping[int, list[str]] | None = None,
) -> None:
    """Write a Parquet file with the columns in the header of this file.

    Args:
        file: The file to write.
        predictions: Logits of all images.
        weights_hash: SHA-256 of each weight file of the model, for the metadata.
        nearest_images: Names of the nearest training images, the nearest first, by the index of the
            image.

    Raises:
        ValueError: Without labeled images.
        OSError: If the file cannot be written.
    """
    import pandas as pd

    names = predictions.label_space.names
    outputs = predictions.outputs
    if not len(outputs.labels):
        raise ValueError("no evaluated image has a label")
    logits = torch.from_numpy(outputs.values)
    targets = torch.from_numpy(outputs.labels)

    columns: dict[str, Any] = {"index": outputs.indices, "image": outputs.names}
    if predictions.label_space.kind == "single_label_classification":
        columns |= {
            "label": [names[label] for label in targets.tolist()],
            "prediction": [names[index] for index in logits.argmax(dim=1).tolist()],
            "probabilities": list(logits.softmax(dim=1).numpy()),
            "loss": cross_entropy(logits, targets, reduction="none").numpy(),
        }
    else:
        losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")  # [N, L]
        columns |= {
            "label": [select_names(names, row, 1) for row in targets],
            "prediction": [
                select_names(names, row, predictions.threshold) for row in logits.sigmoid()
            ],
            "probabilities": list(logits.sigmoid().numpy()),
            "loss": losses.mean(dim=1).numpy(),
        }
    if nearest_images is not None:
        columns["nearest_images"] = [
            nearest_images.get(index, []) for index in outputs.indices.tolist()
        ]

    table = pa.Table.from_pandas(pd.DataFrame(columns), preserve_index=False)
    metadata = {METADATA_KEY: json.dumps({"weights_sha256": weights_hash})}
    table = table.replace_schema_metadata((table.schema.metadata or {}) | metadata)
    with write_atomically(file) as temporary_file:
        pq.write_table(table, temporary_file)


def read_weights_hash(file: Path) -> dict[str, str] | None:
    """Read the SHA-256 of each weight file of the model that computed a file of predictions.

    It is None if the file does not contain it. Raise ValueError or OSError if the file is damaged.
    """
    metadata = pq.read_schema(file).metadata or {}
    if METADATA_KEY not in metadata:
        return None
    return json.loads(metadata[METADATA_KEY]).get("weights_sha256")


def select_names(names: list[str], values: torch.Tensor, threshold: float) -> list[str]:
    """Select the names whose values are at least `threshold`."""
    return [name for name, value in zip(names, values.tolist(), strict=True) if value >= threshold]
