"""Would more photos help? The accuracy of classifiers of a part of the photos.

    features of the run -> five folds -> classifiers of 25, 50, 75 and 100% of the other photos

No image passes the encoder again. What is said has to be above its noise: the gain from half of the
photos to all of them, on the same left-out photos. The accuracies that are said are on a line through
the four, over the logarithm of the number of photos.
"""

from typing import Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from ..data.splits import TrainingData
from .class_statistics import ClassStatistics
from .heads import FrozenHead
from .linear_probe import FEW_IMAGES, NUM_FOLDS, split_folds, stack_tokens


SHARES = (0.25, 0.5, 0.75, 1.0)
MIN_CURVE_IMAGES = 40  # With fewer, a quarter is a handful
MIN_STANDARD_ERRORS = 2.0


def measure_learning_curve(_: TrainingData, head: FrozenHead) -> dict[str, Any] | None:
    """Measure the accuracy with four numbers of training images.

    Returns:
        The mean numbers of images, the accuracies, measured and fitted, and the gain from half of the
        images to all with its standard error; None for several labels per image, and for too few or
        more than `FEW_IMAGES` images.
    """
    probe = head.probe
    num_images = len(probe.losses_)
    if probe.lines_ is not None or not MIN_CURVE_IMAGES <= num_images <= FEW_IMAGES:
        return None
    images = head.features.take(slice(num_images))
    read = probe.candidate_.tokens
    tokens = {token: images.get_tokens()[token] for token in read}
    inputs = stack_tokens(tokens, read)
    classes, labels = np.unique(images.labels, return_inverse=True)
    groups = pd.factorize(images.groups)[0]
    # Images of a group are left out together
    order = np.random.default_rng(0).random(num_images)[groups]

    is_right = np.full((len(SHARES), num_images), np.nan)
    sizes = []
    with threadpool_limits(limits=1):
        for train, test in split_folds(labels, groups, NUM_FOLDS):
            ranks = pd.Series(order[train]).groupby(labels[train]).rank(method="first")
            counts = np.bincount(labels[train])[labels[train]]
            for row, share in zip(is_right, SHARES, strict=True):
                part = train[ranks <= np.maximum(1, share * counts)]
                statistics = ClassStatistics.fit(
                    {token: values[part] for token, values in tokens.items()},
                    labels[part],
                    len(classes),
                    probe.has_covariance(labels[part]),
                )
                weight, bias = statistics.build_classifier(probe.is_balanced)
                logits = inputs[test] @ weight.T + bias
                row[test] = logits.argmax(axis=1) == labels[test]
                sizes.append(len(part))

    if not sizes:  # No group can be left out
        return None
    is_right[:, ~probe.is_counted_] = np.nan  # Photos that are harder than others
    gains = pd.DataFrame({"gain": is_right[-1] - is_right[1], "label": labels, "group": groups})
    by_group = gains.dropna().groupby(["label", "group"])["gain"].mean()
    num_trained = np.reshape(sizes, (-1, len(SHARES))).mean(axis=0)
    # The gain has no error, or the parts have one size, such as one image of each class.
    if len(by_group) < 2 or num_trained[0] == num_trained[-1]:
        return None
    accuracies = np.nanmean(is_right, axis=1)
    line = np.polyfit(np.log(num_trained), accuracies, 1)
    return {
        "num_images": num_trained.round().tolist(),
        "accuracy": accuracies.tolist(),
        "fitted": np.polyval(line, np.log(num_trained)).clip(0, 1).tolist(),
        "gain": float(by_group.mean()),
        "standard_error": float(by_group.sem()),
    }


def describe_learning_curve(record: dict[str, Any]) -> str | None:
    """Say that more photos would help; None unless the curve rises, and the gain is above its noise."""
    is_noise = record["gain"] <= MIN_STANDARD_ERRORS * record["standard_error"]
    if is_noise or record["fitted"][-1] <= record["fitted"][0]:
        return None
    points = zip(record["fitted"], record["num_images"], strict=True)
    texts = [f"{accuracy:.0%} with {num_images:.0f}" for accuracy, num_images in points]
    return f"more photos would help: {', '.join(texts)} training photos"
