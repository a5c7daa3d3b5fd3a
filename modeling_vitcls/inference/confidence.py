"""Calibrated probabilities, unknown images and prediction sets of a single-label classifier.

    fit_temperature(logits, labels)                  T, with which softmax(logits / T) is calibrated
    find_energy_threshold(logits)                    an image with a higher energy shows none of the classes
    find_score_limit(probabilities, labels, ...)     the limit of split conformal prediction
    build_prediction_sets(probabilities, limit, ...) the labels that contain the true label with the chosen coverage
    measure_prediction_sets(probabilities, ...)      their measured coverage, and their size for each class
    measure_unknown(known, unknown, threshold)       how well the energy separates images of none of the classes

All functions work on NumPy arrays: logits [N, L], probabilities [N, L] and label indices [N]. The
temperature and the energy threshold are stored in config.json (`temperature`, `energy_threshold`).
"""

import math
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp


MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 20.0
ALL_CLASSES = "all classes"  # name of the row that summarizes all images
KNOWN_RECALL = 0.95  # fraction of images of the classes below the energy threshold


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that minimizes the cross-entropy of softmax(logits / temperature).

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2. Predicted labels do not depend on the
    temperature.
    """

    def compute_loss(log_temperature: float) -> float:
        log_probabilities = log_softmax(logits / math.exp(log_temperature), axis=1)
        return -float(log_probabilities[np.arange(len(labels)), labels].mean())

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


def measure_unknown(
    known_logits: np.ndarray, unknown_logits: np.ndarray, threshold: float | None
) -> dict[str, Any]:
    """Return how well the energy separates images of the classes from other images.

    The logits are [N, L] and [M, L]. The result has the area under the ROC curve, and the fraction
    of the other images above the energy threshold (None without a threshold).
    """
    from sklearn.metrics import roc_auc_score

    energies = [compute_energies(logits) for logits in (known_logits, unknown_logits)]
    is_unknown = np.repeat([0, 1], list(map(len, energies)))
    return {
        "num_images": len(unknown_logits),
        "auroc": float(roc_auc_score(is_unknown, np.concatenate(energies))),
        "flagged": None if threshold is None else float((energies[1] > threshold).mean()),
    }


def find_score_limit(probabilities: np.ndarray, labels: np.ndarray, coverage: float) -> float:
    """Return the limit of scores with which sets contain the true label with a probability.

    It is the ceil((n + 1) * coverage)-th smallest score of the true labels of n images (split
    conformal prediction). The score of a label is one minus its probability ("lac", Sadinle et al.
    2019, arXiv 1609.00451).

    Raises:
        ValueError: if there are too few images for this coverage.
    """
    rank = math.ceil((len(labels) + 1) * coverage)
    if rank > len(labels):
        # without rounding errors, as for 0.9
        required = math.ceil(coverage / (1 - coverage) - 1e-9)
        raise ValueError(
            f"`coverage={coverage!r}` requires at least {required} labeled images, but there are "
            f"{len(labels)}. Set a lower `coverage`"
        )
    return float(np.sort(1 - probabilities[np.arange(len(labels)), labels])[rank - 1])


def build_prediction_sets(probabilities: np.ndarray, limit: float) -> np.ndarray:
    """Return whether each label is in the prediction set of each image, [N, L].

    A set can be empty.
    """
    return 1 - probabilities <= limit


def measure_prediction_sets(
    probabilities: np.ndarray, labels: np.ndarray, names: list[str], coverage: float
) -> list[dict[str, Any]]:
    """Return the mean size and the coverage of the prediction sets, overall and of each class.

    The limit is fitted to every second image, and the sets are those of the other images. The list
    is empty if there are too few images.
    """
    try:
        limit = find_score_limit(probabilities[::2], labels[::2], coverage)
    except ValueError:
        return []

    sets = build_prediction_sets(probabilities[1::2], limit)
    labels = labels[1::2]
    is_covered = sets[np.arange(len(sets)), labels]  # [N / 2]
    groups = [(ALL_CLASSES, np.ones(len(labels), dtype=bool))]
    groups += [(name, labels == index) for index, name in enumerate(names)]
    return [
        {
            "class": name,
            "images": int(chosen.sum()),
            "size": sets[chosen].sum(axis=1).mean(),
            "coverage": is_covered[chosen].mean(),
        }
        for name, chosen in groups
        if chosen.any()
    ]
