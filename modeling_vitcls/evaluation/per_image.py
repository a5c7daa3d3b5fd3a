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

`finetune` writes the same file for its held-out images, predictions.parquet; `add-task` and
`add-class` write it for the images that were left out. If there are features of a frozen encoder, it
has `nearest_images`, too. Several tasks are not supported. The metadata of the file contains the hash
of the model's weights, because predictions of other weights must not be used.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..hub.model_files import PREDICTIONS_FILE
from ..hub.model_folder import ModelFolder
from ..runtime.errors import warn_on_first_process
from ..runtime.files import check_parquet_size, write_atomically
from .evaluator import Predictions


METADATA_KEY = b"vitcls"


def build_rows(
    predictions: Predictions, nearest_images: Mapping[int, list[str]] | None = None
) -> Any:
    """Build a pandas DataFrame with the columns in the header of this file.

    Args:
        predictions: logits of all images.
        nearest_images: names of the nearest training images, the nearest first, by the index of the
            image.

    Raises:
        ValueError: without labeled images.
    """
    import pandas as pd

    names = predictions.label_space.names
    outputs = predictions.outputs
    if not len(outputs.labels):
        raise ValueError("no evaluated image has a label")
    target = predictions.target
    columns: dict[str, Any] = {
        "index": outputs.indices,
        "image": outputs.names,
        "label": target.get_names(names, outputs.labels),
        "prediction": target.get_names(names, predictions.answers),
        "probabilities": list(target.to_probabilities(outputs.logits)),
        "loss": target.compute_losses(outputs.logits, outputs.labels),
    }
    if nearest_images is not None:
        columns["nearest_images"] = [
            nearest_images.get(index, []) for index in outputs.indices.tolist()
        ]
    return pd.DataFrame(columns)


def write_rows(file: Path, rows: Any, weights_hash: dict[str, str] | None) -> None:
    """Write the rows to a Parquet file, with the SHA-256 of each weight file of the model.

    Raises:
        OSError: if the file cannot be written.
    """
    table = pa.Table.from_pandas(rows, preserve_index=False)
    metadata = {METADATA_KEY: json.dumps({"weights_sha256": weights_hash})}
    table = table.replace_schema_metadata((table.schema.metadata or {}) | metadata)
    with write_atomically(file) as temporary_file:
        pq.write_table(table, temporary_file)


def read_predictions(folder: ModelFolder) -> Any:
    """Read predictions.parquet: a pandas DataFrame with one row per image, and `confidence`.

    The result is None if the folder has no predictions of these weights, or the images do not have
    exactly one label.
    """
    file = folder.path / PREDICTIONS_FILE
    if not folder.results or not file.is_file():
        return None
    try:
        check_parquet_size(file)
        table = pq.read_table(file)
    except (OSError, ValueError):  # The errors of pyarrow are subclasses
        warn_on_first_process(
            f"ignoring {file}, because it is not readable. Write it again with `vitcls evaluate "
            "--per-image`"
        )
        return None
    metadata = json.loads((table.schema.metadata or {}).get(METADATA_KEY, "{}"))
    # A model that was trained again makes other mistakes than those in the file.
    if metadata.get("weights_sha256") != folder.weights_sha256:
        warn_on_first_process(
            f"ignoring {file}, because it contains the predictions of other weights"
        )
        return None
    rows = table.to_pandas()
    # Several labels of an image are a list, of which some may be right and others wrong.
    if not len(rows) or not isinstance(rows["label"][0], str):
        return None
    return rows.assign(confidence=rows["probabilities"].map(max))
