"""95% confidence intervals, computed by scipy. All intervals of the package come from this file.

compute_proportion_interval(num_successes, num_trials, groups)    accuracy, fraction of changed predictions
compute_bootstrap_interval(values)                        mean over images
estimate_after_choice(losses, is_right, ...)              accuracy of the best of several candidates
estimate_average_precision(scores, labels, groups)        mean average precision of several labels
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


CONFIDENCE_LEVEL = 0.95
NUM_RESAMPLES = 1000  # Number of bootstrap samples
NUM_SLOW_RESAMPLES = 200  # of a statistic that takes 7 ms: 300 images with 11 labels
MIN_CORRECTED_IMAGES = 30  # With fewer images, the result is a fraction without a correction

Interval = tuple[float, float]  # Lower and upper bounds


def compute_proportion_interval(
    num_successes: int, num_trials: int, groups: np.ndarray | None = None
) -> list[float]:
    """Compute the Wilson score interval [low, high] of `num_successes / num_trials`.

    The width is positive even if all or no trials succeed (Wilson 1927, "Probable inference, the
    law of succession, and statistical inference"). The images of a group count as one trial: ten
    shots of an object are one piece of evidence.

    Args:
        groups: [num_trials], such as patients, or the copies of an image.
    """
    from scipy import stats  # Slow to import; predictions without answers have no interval

    num_units = num_trials if groups is None else len(np.unique(groups))
    num_right = round(num_successes / num_trials * num_units)
    interval = stats.binomtest(num_right, num_units).proportion_ci(
        CONFIDENCE_LEVEL, method="wilson"
    )
    return [float(interval.low), float(interval.high)]


def compute_bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[..., Any] = np.mean,
    num_resamples: int = NUM_RESAMPLES,
    method: str = "percentile",
) -> Interval:
    """Compute the bootstrap interval of the mean, or of another statistic, of the values."""
    from scipy import stats

    if len(values) < 2:
        return float(statistic(values)), float(statistic(values))
    interval = stats.bootstrap(
        (values,),
        statistic,
        n_resamples=num_resamples,
        confidence_level=CONFIDENCE_LEVEL,
        method=method,
        vectorized=statistic is np.mean,
        rng=0,
    ).confidence_interval
    return float(interval.low), float(interval.high)


def estimate_after_choice(
    losses: np.ndarray,
    is_right: np.ndarray,
    groups: np.ndarray,
) -> dict[str, Any]:
    """Estimate the accuracy of the candidate with the lowest loss, corrected for the choice.

    The out-of-fold accuracy of the best of several candidates is too high, because it was chosen
    for it. Each bootstrap sample of the images chooses a candidate, which the other images measure
    (BBC-CV: Tsamardinos et al. 2018, arXiv 1708.07180, algorithm 5). The interval is never narrower
    than Wilson's: the bootstrap of images that are all right has no width. With fewer than
    `MIN_CORRECTED_IMAGES`, the correction is noise, and the accuracy stays uncorrected.

    Args:
        losses, is_right: [C, N] out-of-fold results of C candidates for N images; losses may be weighted.
        groups: [N]; a sample contains all images of a group or none.

    Returns:
        The metric and its interval, as fields of results.json.
    """
    num_images = losses.shape[1]
    unique, groups = np.unique(groups, return_inverse=True)
    num_groups = len(unique)
    generator = np.random.default_rng(0)
    accuracies = []
    for _ in range(NUM_RESAMPLES):
        drawn = generator.integers(num_groups, size=num_groups)
        counts = np.bincount(drawn, minlength=num_groups)[groups]  # [N]
        # Every image was drawn, so none is left to measure the choice.
        if counts.all():
            continue
        chosen = (losses @ counts).argmin()
        accuracies.append(is_right[chosen, counts == 0].mean())
    if num_images < MIN_CORRECTED_IMAGES:
        accuracies = [is_right[losses.mean(axis=1).argmin()].mean()]
    accuracy = float(np.mean(accuracies))
    # Groups count, not images: ten copies of a photo are one piece of evidence.
    wilson = compute_proportion_interval(round(accuracy * num_groups), num_groups)
    bounds = np.quantile(accuracies, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    interval = [min(bounds[0], wilson[0]), max(bounds[1], wilson[1])]
    return {"accuracy": accuracy, "accuracy_interval": interval}


def estimate_average_precision(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> dict[str, Any]:
    """Estimate the mean average precision of several labels, with a bootstrap interval over images.

    Labels without images do not count. A label without images in a bootstrap sample has there what it
    has on all images: if it were left out, samples without the rare labels would look better.

    Args:
        scores: [N, L], such as logits.
        labels: [N, L] whether an image has a label.
        groups: [N]; a sample contains all images of a group or none.

    Returns:
        The metric and its interval, as fields of results.json. There is no interval below
        `MIN_CORRECTED_IMAGES` groups, and of perfect scores: their bootstrap has no width.
    """
    from sklearn.metrics import average_precision_score

    scores, labels = (each[:, labels.any(axis=0)] for each in (scores, labels))
    unique, groups = np.unique(groups, return_inverse=True)

    def measure(drawn: np.ndarray) -> np.ndarray:
        counts = np.bincount(drawn, minlength=len(unique))[groups]  # [N]
        precisions = whole.copy()
        seen = counts @ labels > 0  # Labels without images are not measured by scikit-learn
        if seen.any():
            precisions[seen] = average_precision_score(
                labels[:, seen], scores[:, seen], average=None, sample_weight=counts
            )
        return precisions.mean()

    whole = np.atleast_1d(average_precision_score(labels, scores, average=None))
    mean = float(whole.mean())
    if mean == 1 or len(unique) < MIN_CORRECTED_IMAGES:
        return {"mean_average_precision": mean}
    # "basic": images that are drawn twice make a sample look better, so its error is mirrored. Of 80 images,
    # the interval then covers the value of new images in 93 instead of 90 % of the cases; with a label that four of
    # them have, in 85 %.
    low, high = compute_bootstrap_interval(range(len(unique)), measure, NUM_SLOW_RESAMPLES, "basic")
    # With many labels of one image, every sample looks better than the images themselves.
    interval = [max(0.0, min(low, mean)), min(1.0, max(high, mean))]
    return {"mean_average_precision": mean, "mean_average_precision_interval": interval}
