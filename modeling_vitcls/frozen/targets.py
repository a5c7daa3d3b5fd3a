"""What is predicted, one label per image or several, on arrays of labels.

                    OneLabelTarget                      SeveralLabelsTarget
labels              [N] names or class indices          [N, L] 0 or 1
probabilities       softmax over the classes            sigmoid of each label
calibration         a temperature                       a line for each label

`find_target` finds the class from the shape of the labels. Logits are [N, K] of K classes or labels.
"""

from typing import Any

import numpy as np
from scipy.special import expit, logit, softmax

from ..inference.prediction_rows import DEFAULT_THRESHOLD
from .confidence import fit_line, fit_temperature


MIN_LABEL_IMAGES = 2  # A label is learned from this many images with it and without it
MIN_PROBABILITY = 1e-30  # Logarithms of out-of-fold probabilities must be finite


class OneLabelTarget:
    """Each image has one of the classes."""

    @staticmethod
    def encode(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the classes, and the class index [N] of each image."""
        classes, indices = np.unique(labels, return_inverse=True)
        return classes, indices

    @staticmethod
    def find_strata(labels: np.ndarray) -> np.ndarray:
        """Find by what folds are stratified: the class [N] of each image."""
        return labels

    @staticmethod
    def calibrate(
        logits: np.ndarray, labels: np.ndarray, weights: np.ndarray
    ) -> tuple[float, np.ndarray | None]:
        """Fit the temperature of logits, given the weight [N] of each image; there are no lines."""
        return fit_temperature(logits, labels, weights), None

    @staticmethod
    def to_probabilities(logits: np.ndarray) -> np.ndarray:
        """Convert logits to the probabilities of the classes."""
        return softmax(logits, axis=1)  # type: ignore[no-any-return]

    @staticmethod
    def to_logits(probabilities: np.ndarray) -> np.ndarray:
        """Convert probabilities to finite logits, at most 0: near it, single precision is finest."""
        logits = np.log(np.maximum(probabilities, MIN_PROBABILITY))
        return logits - logits.max(axis=1, keepdims=True)  # type: ignore[no-any-return]

    @staticmethod
    def predict(logits: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> np.ndarray:
        """Predict the class index [N] of each image; the threshold is for several labels."""
        return logits.argmax(axis=1)

    @staticmethod
    def get_names(names: list[str], answers: np.ndarray) -> list[Any]:
        """Name the class of each image."""
        return [names[index] for index in answers]

    @staticmethod
    def find_right(answers: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Find the images [N] whose class is predicted."""
        return answers == labels  # type: ignore[no-any-return]

    @staticmethod
    def compute_confidences(logits: np.ndarray) -> np.ndarray:
        """Compute the probability [N] of each prediction."""
        return softmax(logits, axis=1).max(axis=1)


class SeveralLabelsTarget:
    """Each image has any number of the labels. Labels are 0 or 1."""

    @staticmethod
    def encode(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the labels, and a mask [N, L]."""
        return np.arange(labels.shape[1]), labels > 0.5

    @staticmethod
    def find_strata(labels: np.ndarray) -> np.ndarray:
        """Find the rarest label [N] of each image that can be learned.

        Images without such a label are together.
        """
        num_images, num_labels = labels.shape
        counts = np.where(labels & find_learned(labels), labels.sum(axis=0), num_images)
        strata = np.where(counts.min(axis=1) < num_images, counts.argmin(axis=1), num_labels)
        # The only image of a stratum would train every fold, so it joins those without a label.
        return np.where(np.bincount(strata)[strata] < 2, num_labels, strata)

    @staticmethod
    def calibrate(
        logits: np.ndarray, labels: np.ndarray, weights: np.ndarray
    ) -> tuple[float, np.ndarray | None]:
        """Fit a line to the scores of each label, [2, L] slopes and offsets; the temperature is 1.

        A label that cannot be learned has its smoothed share of the images as its probability.
        """
        scores = np.where(find_learned(labels), logits, 0.0)
        shares = (labels.sum(axis=0) + 1) / (len(labels) + 2)
        lines = [fit_line(*columns) for columns in zip(scores.T, labels.T, strict=True)]
        slopes, offsets = np.transpose(lines)
        return 1.0, np.stack([slopes, np.where(scores.any(axis=0), offsets, logit(shares))])

    @staticmethod
    def to_probabilities(logits: np.ndarray) -> np.ndarray:
        """Convert logits to the probability of each label."""
        return expit(logits)  # type: ignore[no-any-return]

    @staticmethod
    def to_logits(probabilities: np.ndarray) -> np.ndarray:
        """Convert probabilities to finite logits."""
        return logit(np.clip(probabilities, 1e-12, 1 - 1e-12))

    @staticmethod
    def predict(logits: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> np.ndarray:
        """Predict the labels whose probability is at least the threshold: a mask [N, L]."""
        return expit(logits) >= threshold

    @staticmethod
    def get_names(names: list[str], answers: np.ndarray) -> list[Any]:
        """List the names of the labels of each image."""
        return [[names[index] for index in np.flatnonzero(row)] for row in answers > 0.5]

    @staticmethod
    def find_right(answers: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Find the images [N] of which all labels are predicted right."""
        return (answers == labels).all(axis=1)

    @staticmethod
    def compute_confidences(logits: np.ndarray) -> np.ndarray:
        """Compute the lowest probability [N] of a decision about a label: yes or no."""
        probabilities = expit(logits)
        return np.maximum(probabilities, 1 - probabilities).min(axis=1)


Target = type[OneLabelTarget] | type[SeveralLabelsTarget]


def find_target(labels: np.ndarray) -> Target:
    """Tell the kind of an array of labels: [N], or [N, L] with several labels per image."""
    return SeveralLabelsTarget if labels.ndim == 2 else OneLabelTarget


def find_learned(labels: np.ndarray) -> np.ndarray:
    """Find which of several labels [N, L] can be learned: a mask [L]."""
    counts = labels.sum(axis=0)
    return np.minimum(counts, len(labels) - counts) >= MIN_LABEL_IMAGES  # type: ignore[no-any-return]
