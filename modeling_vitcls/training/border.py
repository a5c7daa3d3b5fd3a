"""How much of what tells a class from the others is in the border of the photos: a frame, a wall.

A linear classifier of the mean of the patches is a sum over patches, so the part of the outer ring is
exact. CLS has no such sum. Patches have seen their neighbors, so a frame of one patch is hardly seen.
"""

from typing import Any

import numpy as np

from ..inference.frozen_features import BORDER, mark_border
from .heads import FrozenHead


# A class is named if its share is as much above the share of the patches. Normal photos (clothing and
# CIFAR-10, 2 or 5 classes of 5 to 40 photos): 0.20 to 0.58 with 0.44 of the patches, 1 of 2,400 classes
# named. A green frame of a sixth of the side: 0.60 to 0.70.
MIN_RATIO = 1.25


def measure_border(frozen: FrozenHead, grid_size: tuple[int, int]) -> dict[str, Any] | None:
    """Measure how much of each class's lead over the other photos comes from the border.

    The lead is what the patches contribute to the score of a class, in its photos minus in the
    others. The photos are held out or, without those, training images.

    Returns:
        The share of the border in the patches, and in the lead of each class. None if the
        classifier reads no patches, and for several labels per image.
    """
    probe = frozen.probe
    tokens = probe.candidate_.tokens
    if probe.lines_ is not None or all(kind != "mean" for _, kind in tokens):
        return None
    images = frozen.features if frozen.held_out is None else frozen.held_out
    features = images.layout.split(images.values)
    ends = np.cumsum([features[token].shape[1] for token in tokens])[:-1]
    from_patches = np.zeros((len(images.labels), len(probe.classes_)))
    from_border = np.zeros_like(from_patches)
    for (layer, kind), weight in zip(tokens, np.split(probe.weight_, ends, axis=1), strict=True):
        if kind == "mean":
            from_patches += features[layer, kind] @ weight.T
            from_border += features[layer, BORDER] @ weight.T

    shares = {}
    for index, label in enumerate(probe.classes_):
        is_own = images.labels == label
        if is_own.any() and not is_own.all():
            lead, border_lead = (
                each[is_own, index].mean() - each[~is_own, index].mean()
                for each in (from_patches, from_border)
            )
            if lead > 0:
                shares[frozen.labels.names[label]] = round(float(border_lead / lead), 3)
    return {"patches": round(float(mark_border(grid_size).mean()), 3), "shares": shares}


def describe_border(record: dict[str, Any] | None) -> str | None:
    """Name the classes that the border of the photos distinguishes from the others, or return None."""
    if record is None:
        return None
    limit = MIN_RATIO * record["patches"]
    texts = [f"{name}: {share:.0%}" for name, share in record["shares"].items() if share >= limit]
    if not texts:
        return None
    return (
        f"{', '.join(texts)} of the score comes from the border of the photos, {record['patches']:.0%} "
        "of their area. Look for something there that only these photos have, such as a frame"
    )
