"""The share of the border of the photos, such as a frame or a wall, in the score of a label.

A linear classifier of the mean of the patches is a sum over patches, so the part of an outer ring is
exact. CLS has no such sum.
"""

from typing import Any

import numpy as np

from ..data.splits import TrainingData
from ..inference.features import mark_rings
from .heads import FrozenHead


# A label is named if its share of a ring is as much above the share of the patches. Normal photos (840
# draws of a class of clothing and CIFAR-10 among 2, 5 or 10): at most 1.25 and 1.21. A green frame
# of one patch around one of ten classes: 1.42 to 2.01 and 1.20 to 1.40.
MIN_RATIOS = 1.3, 1.25
MIN_GRID_SIDE = 8  # In patches. Of smaller grids, the border is most of the photo


def measure_border(_: TrainingData, head: FrozenHead) -> dict[str, Any] | None:
    """Measure how much of each label's lead over the other photos comes from the border.

    The lead is what the patches contribute to the score of a label, in its photos minus in the
    others.

    Returns:
        The share of each ring in the patches, and in the lead of each label; no label has a share in
        a classifier that reads no patches. None on a small grid, and without rings.
    """
    images = head.sample
    if images is None or min(head.grid_size) < MIN_GRID_SIDE:
        return None
    candidate, classes = head.probe.candidate_, head.probe.classes_
    is_own = images.labels > 0.5
    if images.labels.ndim == 1:
        is_own = images.labels[:, None] == classes  # [N, K]
    with np.errstate(invalid="ignore"):  # NaN if all photos or none have a label
        signs = is_own / is_own.sum(axis=0) - ~is_own / (~is_own).sum(axis=0)

    weights = np.split(head.probe.heads_[0][0], len(candidate.tokens), axis=1)
    tokens = images.get_tokens()
    leads = np.zeros((1 + images.rings.shape[1], len(classes)))
    for (layer, kind), weight in zip(candidate.tokens, weights, strict=True):
        if kind == "mean":
            parts = [tokens[layer, kind], *np.moveaxis(images.rings[:, :, layer], 1, 0)]
            leads += [(signs * (part @ weight.T)).sum(axis=0) for part in parts]
    shares = {
        head.labels.names[index]: (rings / whole).tolist()
        for index, (whole, *rings) in zip(classes, leads.T, strict=True)
        if whole > 0
    }
    patches = [float(is_border.mean()) for is_border in mark_rings(head.grid_size)]
    return {"patches": patches, "shares": shares}


def describe_border(record: dict[str, Any]) -> str | None:
    """Name the labels that the border of the photos distinguishes from the others, or return None.

    The ring is the one whose largest share is furthest above its limit.
    """
    if not record["shares"]:
        return None
    limits = np.multiply(MIN_RATIOS, record["patches"])
    ring = (np.array(list(record["shares"].values())) / limits).max(axis=0).argmax()
    shares = {
        name: each[ring] for name, each in record["shares"].items() if each[ring] >= limits[ring]
    }
    if not shares:
        return None
    text = ", ".join(f"{name}: {share:.0%}" for name, share in shares.items()) + " of the score"
    # Two classes have one difference of scores, so both have the same share.
    if len(record["shares"]) == 2 and len(set(shares.values())) < len(shares):
        text = f"{max(shares.values()):.0%} of the difference between {' and '.join(shares)}"
    return (
        f"{text} comes from the border of the photos, {record['patches'][ring]:.0%} "
        "of their area. Look for something there that not all of them have, such as a frame"
    )
