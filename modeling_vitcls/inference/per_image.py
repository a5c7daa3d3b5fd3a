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

from .confidence import compute_energies
from .evaluator import Evaluator, OutputRow


def write_predictions(file: Path, evaluator: Evaluator) -> None:
    """Write the columns in the header of this file for the images of the last evaluation (`Evaluator.rows`) to a
    Parquet file. Raise ValueError without labeled images, and OSError if the file cannot be written."""
    import pandas as pd

    names = evaluator.label_space.names
    rows = [row for row in evaluator.rows if is_labeled(row)]
    if not rows:
        raise ValueError("no evaluated image has a label")
    logits = torch.from_numpy(np.stack([row.logits for row in rows]))
    targets = torch.stack([row.label for row in rows])
    columns: dict[str, Any] = {"index": [row.index for row in rows], "image": [row.name for row in rows]}
    if evaluator.label_space.kind == "single_label_classification":
        columns |= {
            "label": [names[label] for label in targets.tolist()],
            "prediction": [names[index] for index in logits.argmax(dim=1).tolist()],
            "probabilities": list(logits.softmax(dim=1).numpy()),
            "loss": cross_entropy(logits, targets, reduction="none").numpy(),
            "energy": compute_energies(logits.numpy()),
        }
    else:
        columns |= {
            "label": [select_names(names, row) for row in targets],
            "prediction": [select_names(names, row) for row in logits.sigmoid()],
            "probabilities": list(logits.sigmoid().numpy()),
            "loss": binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1).numpy(),
        }
    pd.DataFrame(columns).to_parquet(file, index=False)


def read_predictions(file: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities [N, L] and label indices [N] of a file of images with one label each. `names` are the
    labels of the model, in order."""
    import pandas as pd

    rows = pd.read_parquet(file, columns=["label", "probabilities"])
    return np.stack(rows["probabilities"]), np.array([names.index(label) for label in rows["label"]])


def get_outputs(evaluator: Evaluator, images: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N, L] and labels [N] of the selected images of the last evaluation that have a label."""
    rows = [row for row in evaluator.rows[images] if is_labeled(row)]
    if not rows:
        return np.zeros((0, 1), np.float32), np.zeros(0, np.int64)
    return np.stack([row.logits for row in rows]), torch.stack([row.label for row in rows]).numpy()


def is_labeled(row: OutputRow) -> bool:
    """Return whether the label of an image is known."""
    return bool(row.label.ndim or row.label >= 0)


def select_names(names: list[str], values: torch.Tensor) -> list[str]:
    """Return the names whose values are above 0.5."""
    return [name for name, value in zip(names, values.tolist(), strict=True) if value > 0.5]
