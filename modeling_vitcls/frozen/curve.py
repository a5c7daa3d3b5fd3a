"""Would more photos help? The accuracy of classifiers of half of the photos, and of all.

    features of the run -> five folds -> classifiers of half of the other photos and of all others

No image passes the encoder again. What is said has to be above its noise: the gain from half of the
photos to all of them, on the same left-out photos.
"""

from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from ..data.splits import TrainingData
from .heads import FrozenHead
from .linear_probe import FEW_IMAGES, NUM_FOLDS, split_folds


MIN_CURVE_IMAGES = 40  # With fewer, half is a handful
MIN_STANDARD_ERRORS = 2.0


def measure_learning_curve(_: TrainingData, head: FrozenHead) -> dict[str, Any] | None:
    """Measure the accuracy with half of the training images and with all.

    Returns:
        The mean numbers of images, the accuracies, and the gain from half to all with its standard
        error; None for several labels per image, and for too few or more than `FEW_IMAGES` images.
    """
    probe = head.probe
    num_images = len(probe.losses_)
    if probe.lines_ is not None or not MIN_CURVE_IMAGES <= num_images <= FEW_IMAGES:
        return None
    images = head.features.take(slice(num_images))
    candidate = probe.candidate_
    tokens = {token: images.get_tokens()[token] for token in chain(*candidate.heads)}
    labels = np.searchsorted(probe.classes_, images.labels)
    groups = pd.factorize(images.groups)[0]
    # Images of a group are left out together
    order = np.random.default_rng(0).random(num_images)[groups]

    whole = split_folds(labels, groups, NUM_FOLDS)
    halves = []
    for train, test in whole:
        ranks = pd.Series(order[train]).groupby(labels[train]).rank(pct=True)
        halves.append((train[ranks > 0.5], test))  # At least one image of each class
    is_right = []
    for folds in (halves, whole):
        with threadpool_limits(limits=1):
            logits = probe.cross_validate(tokens, labels, [candidate], folds)[0][candidate]
        is_right.append(logits.argmax(axis=1) == labels)

    half, full = np.where(np.isfinite(logits).all(axis=1), is_right, np.nan)
    gains = pd.DataFrame({"gain": full - half, "label": labels, "group": groups})
    by_group = gains.dropna().groupby(["label", "group"])["gain"].mean()
    if len(by_group) < 2:  # The gain has no error
        return None
    return {
        "num_images": [
            round(np.mean([len(train) for train, _ in each])) for each in (halves, whole)
        ],
        "accuracy": [float(np.nanmean(each)) for each in (half, full)],
        "gain": float(by_group.mean()),
        "standard_error": float(by_group.sem()),
    }


def describe_learning_curve(record: dict[str, Any]) -> str | None:
    """Say that more photos would help; None unless the gain is above its noise."""
    if record["gain"] <= MIN_STANDARD_ERRORS * record["standard_error"]:
        return None
    points = zip(record["accuracy"], record["num_images"], strict=True)
    texts = [f"{accuracy:.0%} with {num_images}" for accuracy, num_images in points]
    return f"more photos would help: {', '.join(texts)} training photos"
