"""Calibrated probabilities of a classifier, from the logits of images that it was not fitted to.

one label per image         softmax(logits / temperature)         fit_temperature
several labels per image    sigmoid(slope * score + offset)       fit_line, for each label
"""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logit
from sklearn.linear_model import LogisticRegression


# Logarithms of the temperature, in units of the spread of the logits: probabilities are hardly more
# equal at e^6, and single precision still orders them.
LOG_TEMPERATURES = -20.0, 6.0


def fit_temperature(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Find the temperature that minimizes the cross-entropy of softmax(logits / temperature).

    The target of an image is (N + 1/2) / (N + 1) for its label, and the rest for the others: N
    images that are all right do not prove that the next one is. Without it, the temperature of few
    images would go to 0 (Platt 1999, "Probabilistic outputs for support vector machines", section
    2.2, with the prior of Jeffreys).

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2. Predicted labels do not depend on the
    temperature. Images have equal weights unless `weights` [N] is given.
    """
    num_images, num_labels = logits.shape
    right = (num_images + 0.5) / (num_images + 1)
    targets = np.full(logits.shape, (1 - right) / max(num_labels - 1, 1))
    targets[np.arange(num_images), labels] = right

    def compute_loss(log_temperature: float) -> float:
        log_probabilities = log_softmax(logits / math.exp(log_temperature), axis=1)
        return -float(np.average((targets * log_probabilities).sum(axis=1), weights=weights))

    # The logarithm is searched: it has no sign to get wrong, and half is as far away as twice.
    bounds = np.add(LOG_TEMPERATURES, math.log(measure_spread(logits) or 1.0))
    return math.exp(
        minimize_scalar(compute_loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x
    )


def fit_line(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Find the slope and the offset for which sigmoid(slope * score + offset) is the probability.

    The target of an image with the label is (N + 1) / (N + 2), of N images with it, and the target of
    the others is 1 / (M + 2), of M without it (Platt 1999, "Probabilistic outputs for support vector
    machines", section 2.2). The slope isn't negative: such scores are noise.

    Args:
        scores: [N].
        labels: [N] whether an image has the label.
    """
    num_with = labels.sum()
    targets = np.where(labels, (num_with + 1) / (num_with + 2), 1 / (len(labels) - num_with + 2))
    scale = scores.std() or 1.0
    # Each image counts with the label and without it, in these parts.
    regression = LogisticRegression(C=np.inf, tol=1e-9).fit(
        np.tile(scores / scale, 2)[:, None],
        np.repeat([True, False], len(scores)),
        np.concatenate([targets, 1 - targets]),
    )
    slope = regression.coef_.item() / scale
    if slope < 0:
        return 0.0, float(logit(targets.mean()))
    return slope, regression.intercept_.item()


def measure_spread(logits: np.ndarray) -> float:
    """Measure the spread of logits [N, K]: the standard deviation from the mean of each image."""
    return float((logits - logits.mean(axis=1, keepdims=True)).std())
