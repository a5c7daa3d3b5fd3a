"""One row per evaluated image: what the model predicted, how sure it was, and how wrong (`evaluate --per-image`).

column          one label per image                     several labels per image
index           index in the split                      same
image           path within the dataset, a checksum, or the row number
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

from ..data.labels import LabelSpace
from .confidence import compute_energies
from .evaluator import Evaluator


def check_per_image(label_space: LabelSpace) -> None:
    """Raise ValueError if the rows are not defined for the kind of labels."""
    if label_space.kind == "multi_task":
        raise ValueError(
            f"--per-image supports one task, but the model has the tasks {', '.join(label_space.columns)}. Use "
            " `vitcls predict --dataset`, which writes the prediction of each task"
        )


def write_predictions(file: Path, evaluator: Evaluator) -> None:
    """Write the rows of the images of the last evaluation (`Evaluator.logits`) to a Parquet file.

    Raises:
        OSError: if the file cannot be written.
    """
    import pandas as pd

    columns = build_image_rows(evaluator)
    pd.DataFrame({name: list(values) for name, values in columns.items()}).to_parquet(file, index=False)


def read_predictions(file: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities [N, L] and label indices [N] of a file of images with one label each. `names` are the
    labels of the model, in order."""
    import pandas as pd

    rows = pd.read_parquet(file, columns=["label", "probabilities"])
    return np.stack(rows["probabilities"]), np.array([names.index(label) for label in rows["label"]])


def build_image_rows(evaluator: Evaluator) -> dict[str, Any]:
    """Return the columns of the table in the header of this file."""
    label_space, names = evaluator.label_space, evaluator.label_space.names
    indices = list_labeled_images(evaluator)
    if not indices:
        raise ValueError("no evaluated image has a label")
    logits = torch.stack([evaluator.logits[index] for index in indices])  # [N, L]
    targets = torch.stack([evaluator.labels[index] for index in indices]).cpu()  # [N] or [N, L]
    columns: dict[str, Any] = {"index": indices, "image": [evaluator.names[index] for index in indices]}
    if label_space.kind == "single_label_classification":
        return columns | {
            "label": [names[label] for label in targets.tolist()],
            "prediction": [names[index] for index in logits.argmax(dim=1).tolist()],
            "probabilities": logits.softmax(dim=1).numpy(),
            "loss": cross_entropy(logits, targets, reduction="none").numpy(),
            "energy": compute_energies(logits.numpy()),
        }
    return columns | {
        "label": [select_names(names, row) for row in targets],
        "prediction": [select_names(names, row) for row in logits.sigmoid()],
        "probabilities": logits.sigmoid().numpy(),
        "loss": binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1).numpy(),
    }


def get_outputs(evaluator: Evaluator, images: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N, L] and labels [N] of the selected images of the last evaluation that have a label."""
    selected = set(list(evaluator.logits)[images])
    indices = [index for index in list_labeled_images(evaluator) if index in selected]
    if not indices:
        return np.zeros((0, 1), np.float32), np.zeros(0, np.int64)
    logits = torch.stack([evaluator.logits[index] for index in indices]).numpy()
    return logits, torch.stack([evaluator.labels[index] for index in indices]).cpu().numpy()


def list_labeled_images(evaluator: Evaluator) -> list[int]:
    """Return the indices of the images of the last evaluation that have a label."""
    return [index for index, label in evaluator.labels.items() if label.ndim or label >= 0]


def select_names(names: list[str], values: torch.Tensor) -> list[str]:
    """Return the names whose values are above 0.5."""
    return [name for name, value in zip(names, values.tolist(), strict=True) if value > 0.5]
