"""One row per evaluated image: what the model predicted, how sure it was, and how wrong (`evaluate --per-image`).

column          one label per image                     several labels per image
index           index in the split                      same
image           path within the dataset, a checksum, or the index
label           name                                    list of names
prediction      name                                    list of names with a probability above 0.5
probabilities   list, in the order of the model's labels (calibrated if the model has a temperature)
loss            cross-entropy                           binary cross-entropy, mean over the labels
energy          -log(sum(exp(logits)))                  -

`finetune` writes the same file for its held-out images, predictions.parquet. Several tasks are not supported.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ..data.images import LabeledImages, get_image_ids
from ..data.labels import LabelSpace
from .confidence import compute_energies


def check_per_image(label_space: LabelSpace) -> None:
    """Raise ValueError if the rows are not defined for the kind of labels."""
    if label_space.kind == "multi_task":
        raise ValueError(
            f"--per-image supports one task, but the model has the tasks {', '.join(label_space.columns)}. Use "
            " `vitcls predict --dataset`, which writes the prediction of each task"
        )


def write_predictions(
    file: Path, logits: dict[int, torch.Tensor], images: LabeledImages, label_space: LabelSpace
) -> None:
    """Write the rows of the images whose logits [L] are given (`Evaluator.logits`) to a Parquet file.

    Raises:
        OSError: if the file cannot be written.
    """
    import pandas as pd

    columns = build_image_rows(logits, images, label_space)
    pd.DataFrame({name: list(values) for name, values in columns.items()}).to_parquet(file, index=False)


def read_predictions(file: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities [N, L] and label indices [N] of a file of images with one label each. `names` are the
    labels of the model, in order."""
    import pandas as pd

    rows = pd.read_parquet(file, columns=["label", "probabilities"])
    return np.stack(rows["probabilities"]), np.array([names.index(label) for label in rows["label"]])


def build_image_rows(
    logits: dict[int, torch.Tensor], images: LabeledImages, label_space: LabelSpace
) -> dict[str, Any]:
    """Return the columns of the table in the header of this file."""
    names, ids = label_space.names, get_image_ids(images)
    indices = [index for index in logits if is_labeled(images.labels[index])]
    stacked = torch.stack([logits[index] for index in indices])  # [N, L]
    labels = [images.labels[index] for index in indices]
    columns: dict[str, Any] = {"index": indices, "image": [ids[index] for index in indices]}
    if label_space.kind == "single_label_classification":
        targets = torch.tensor(labels)
        return columns | {
            "label": [names[label] for label in labels],
            "prediction": [names[index] for index in stacked.argmax(dim=1).tolist()],
            "probabilities": stacked.softmax(dim=1).numpy(),
            "loss": cross_entropy(stacked, targets, reduction="none").numpy(),
            "energy": compute_energies(stacked.numpy()),
        }
    targets = torch.tensor(labels, dtype=torch.float32)
    return columns | {
        "label": [select_names(names, row) for row in targets],
        "prediction": [select_names(names, row) for row in stacked.sigmoid()],
        "probabilities": stacked.sigmoid().numpy(),
        "loss": binary_cross_entropy_with_logits(stacked, targets, reduction="none").mean(dim=1).numpy(),
    }


def is_labeled(label: Any) -> bool:
    """Return whether an image has a label."""
    return not isinstance(label, int | np.integer) or bool(label >= 0)


def select_names(names: list[str], values: torch.Tensor) -> list[str]:
    """Return the names whose values are above 0.5."""
    return [name for name, value in zip(names, values.tolist(), strict=True) if value > 0.5]
