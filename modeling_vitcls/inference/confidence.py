"""Calibrated probabilities and unknown images of a single-label classifier.

    fit_temperature(logits, labels)    T, with which softmax(logits / T) is calibrated
    find_energy_threshold(logits)      an image with a higher energy shows none of the classes

All functions work on NumPy arrays: logits [N, L] and label indices [N]. The temperature
and the energy threshold are stored in config.json (`temperature`, `energy_threshold`).
"""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp


MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 100.0
KNOWN_RECALL = 0.95  # fraction of images of the classes below the energy threshold


def fit_temperature(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Return the temperature that minimizes the cross-entropy of softmax(logits / temperature).

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


def compute_energies(logits: np.ndarray) -> np.ndarray:
    """Return the energy [N] of each image, -log(sum(exp(logits))).

    Source: Liu et al. 2020, arXiv 2010.03759, section 3.1.

    The energy is low for images that resemble the training images.
    """
    return -logsumexp(logits, axis=1)


def find_energy_threshold(logits: np.ndarray) -> float:
    """Return the energy below which the fraction `KNOWN_RECALL` of images of the classes lies."""
    return float(np.quantile(compute_energies(logits), KNOWN_RECALL, method="higher"))
