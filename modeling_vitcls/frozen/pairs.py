"""Are two classes one kind with two names?

predictions out of fold -> the pair of classes that are exchanged most often -> a question
"""

from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from ..data.splits import TrainingData
from .heads import FrozenHead


# Photos of both classes that are taken for one of the two; of fewer, half may be right by chance
MIN_PHOTOS = 30
# Natural pairs of ten kinds of clothing (CLS and mean patch of a ViT-S/14 at 112 pixels, 20 to 60 photos of each,
# 14 draws): 0.59 or more. One kind that was divided by chance: 0.58 or less in 34 of 37 pairs.
MAX_ACCURACY = 0.58


def measure_pairs(_: TrainingData, head: FrozenHead) -> dict[str, Any] | None:
    """Measure which two classes are exchanged most often, out of fold.

    Returns:
        Their names, and how many photos of both are taken for one of the two, and for the right one. None
        for several labels per image, and if no pair has `MIN_PHOTOS`.
    """
    probe = head.probe
    # Photos that were chosen because a model was unsure about them are harder than others
    known = np.isfinite(probe.losses_) & probe.is_counted_
    if probe.lines_ is not None or not known.any():
        return None
    matrix = confusion_matrix(
        head.features.labels[: len(known)][known],
        probe.classes_[probe.out_of_fold_[known].argmax(axis=1)],
        labels=probe.classes_,
    )
    right = matrix.diagonal() + matrix.diagonal()[:, None]
    counts = right + matrix + matrix.T
    np.fill_diagonal(counts, 0)
    accuracies = np.where(counts < MIN_PHOTOS, np.inf, right) / np.maximum(counts, 1)
    pair = np.unravel_index(accuracies.argmin(), matrix.shape)
    if counts[pair] < MIN_PHOTOS:
        return None
    return {
        "classes": [head.labels.names[probe.classes_[index]] for index in pair],
        "num_photos": int(counts[pair]),
        "num_right": int(right[pair]),
    }


def describe_pairs(record: dict[str, Any]) -> str | None:
    """Ask whether two classes are one kind if they are exchanged as often as by chance, or return None."""
    right, count = record["num_right"], record["num_photos"]
    if right > MAX_ACCURACY * count:
        return None
    return (
        f"{' and '.join(record['classes'])} are exchanged about as often as by chance ({right:,} of {count:,} "
        "right): are they one kind? If so, join them"
    )
