"""Calibrated probabilities of a single-label classifier, from logits [N, L] and labels [N]."""

import math

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_softmax, softmax


MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 100.0


def fit_temperature(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Find the temperature that minimizes the cross-entropy of softmax(logits / temperature).

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2. Predicted labels do not depend on the
    temperature. Images have equal weights unless `weights` [N] is given.
    """
    rows = np.arange(len(labels))

    def compute_loss(log_temperature: float) -> float:
        log_probabilities = log_softmax(logits / math.exp(log_temperature), axis=1)
        return -float(np.average(log_probabilities[rows, labels], weights=weights))

    bounds = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
    return math.exp(
        minimize_scalar(compute_loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x
    )


def fit_confidence(probabilities: np.ndarray, accuracy: float) -> float:
    """Return a divisor of the logits, at least 1, that lowers the mean confidence to `accuracy`.

    Args:
        probabilities: [N, L].
        accuracy: between the chance of one label, 1 / L, and 1.
    """
    logits = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))

    def compute_excess(log_divisor: float) -> float:
        confidences = softmax(logits / math.exp(log_divisor), axis=1).max(axis=1)
        return float(confidences.mean()) - accuracy

    low, high = 0.0, math.log(MAX_TEMPERATURE)
    if compute_excess(low) <= 0 or compute_excess(high) >= 0:
        return 1.0
    return math.exp(brentq(compute_excess, low, high))
