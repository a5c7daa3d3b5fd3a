"""Calibrated probabilities of a single-label classifier, from logits [N, L] and labels [N]."""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax


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
