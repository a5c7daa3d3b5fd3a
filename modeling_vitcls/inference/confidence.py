"""Calibrated probabilities of a single-label classifier, from logits [N, L] and labels [N]."""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax


MAX_LOG_TEMPERATURE = 20.0  # at which all probabilities are equal, in single precision


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

    bounds = (-MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE)
    # The logarithm is searched: it has no sign to get wrong, and half is as far away as twice.
    return math.exp(
        minimize_scalar(compute_loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x
    )
