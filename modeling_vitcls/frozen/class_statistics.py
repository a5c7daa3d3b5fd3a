"""Class means and a shared covariance of features: a classifier, a distance, and added classes.

    features and labels -> ClassStatistics.fit -> .build_classifier()    weight and bias, without steps
                                               -> .compute_distances()   how far an image is from all classes
                                               -> .extend(), .build_new_rows()    rows of further classes
    features and several labels -> build_label_scores    weight and bias of each label

This is linear discriminant analysis (Gaussian classes with one covariance), which is better than
logistic regression with few labels (Wang et al. 2024, arXiv 2402.04087). Each kind of token of each
layer has its own means and covariance; the logits of all of them are averaged, so the classifier is
one linear layer on the concatenated tokens. The covariance is the same as in scikit-learn's
`LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")`: the average over the classes of
Ledoit-Wolf estimates.

The logits of this classifier are overconfident, so a model divides its weights by a temperature. Its
logits h and the logits of the statistics, g, then have different scales, more so after training. The
row of an added class is therefore shifted and scaled:

    h_new = mean(h) + std(h) / std(g) * (g_new - mean(g))

The means are over the old classes; the standard deviations are over images and old classes, after g
and h were centered for every image. This is also linear in the features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import linalg

from ..inference.features import Token, Tokens
from ..model.heads_vitcls import ClassDistance


# Smallest variance of a feature within the classes, as a part of the median of all features. Features of
# trained encoders are far above it.
MIN_RELATIVE_VARIANCE = 1e-6
KNOWN_RECALL = 0.95  # Fraction of training images within the distance threshold

TokenFeatures = Mapping[Token, np.ndarray]  # [N, D] of each token, after the final norm


@dataclass(frozen=True)
class ClassStatistics:
    """Statistics of the features of T tokens for K classes.

    Attributes:
        tokens: what the statistics are of, in the order in which a classifier reads them.
        means: one [K, D] for each token; zeros for a class without images.
        precisions: one [D, D] for each token, the inverse of the covariance within the classes.
        sizes: [T] trace of precision times the covariance without shrinkage, the effective
            number of features.
        counts: [K] number of images of each class.
        scales: [K] divisors of the distances to each class; 1 but for added classes, whose images
            may differ more than those that set the threshold.

    Example::

        statistics = ClassStatistics.fit({(-1, "cls"): features}, labels, num_labels=3)
        weight, bias = statistics.build_classifier()
        predicted = (features @ weight.T + bias).argmax(axis=1)
    """

    tokens: Tokens
    means: tuple[np.ndarray, ...]
    precisions: tuple[np.ndarray, ...]
    sizes: np.ndarray
    counts: np.ndarray
    scales: np.ndarray

    @classmethod
    def fit(
        cls,
        features: TokenFeatures,
        labels: np.ndarray,
        num_labels: int,
        has_covariance: bool = True,
    ) -> "ClassStatistics":
        """Compute the statistics of features and labels [N] from 0 to `num_labels` - 1.

        Without a class of two images, or without `has_covariance`, the variance within classes is
        unknown. All features then have the same variance, and the nearest mean wins.
        """
        counts = np.bincount(labels, minlength=num_labels)
        has_covariance = has_covariance and counts.max(initial=0) > 1
        means, precisions, sizes = [], [], []
        for values in features.values():
            values = values.astype(np.float64)
            mean = compute_means(values, labels, counts)
            residuals = values - mean[labels]
            if has_covariance:
                precision = estimate_precision(residuals, labels, counts)
            else:
                # The variance of each feature, not of all numbers: some features are far from 0 in every image.
                precision = np.eye(values.shape[1]) / (values.var(axis=0).mean() or 1.0)
            means.append(mean)
            precisions.append(precision)
            # The noise of the means is what varies within the classes, of which pairs know a little.
            # The total variance is mostly between the classes.
            own = np.einsum("nd,nd->", residuals @ precision, residuals)
            sizes.append(float(own / max(counts[counts > 1].sum(), 1)))
        return cls(
            tokens=tuple(features),
            means=tuple(means),
            precisions=tuple(precisions),
            sizes=np.array(sizes),
            counts=counts,
            scales=np.ones(num_labels),
        )

    def select(self, tokens: Sequence[Token]) -> "ClassStatistics":
        """Select the statistics of some of the tokens."""
        chosen = [self.tokens.index(token) for token in tokens]
        return replace(
            self,
            tokens=tuple(tokens),
            means=tuple(self.means[index] for index in chosen),
            precisions=tuple(self.precisions[index] for index in chosen),
            sizes=self.sizes[chosen],
        )

    def build_classifier(self, has_equal_priors: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Build the classifier: weight [K, T * D] and bias [K] of the averaged linear discriminants.

        A class is as frequent as in the images or, with `has_equal_priors`, as every other class.
        The mean over the classes is subtracted, which changes no probability: it is much larger
        than the differences, which half precision would round away. The rows of classes without
        images are 0, with a bias of minus infinity.
        """
        weight, bias = self.compute_discriminants()
        known = self.counts > 0
        priors = np.where(known, 1 if has_equal_priors else self.counts, 0)
        with np.errstate(divide="ignore"):
            bias = bias - bias[known].mean() + np.log(priors / priors.sum())
        return np.where(known[:, None], weight - weight[known].mean(axis=0), 0), bias

    def compute_mean_logits(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Compute the logits of a classifier at the class means, of the classes with images."""
        known = self.counts > 0
        means = np.concatenate(self.means, axis=1)[known]
        return means @ weight[known].T + bias[known]

    def compute_discriminants(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute weight [K, T * D] and bias [K] without priors, averaged over the tokens."""
        weights = [
            mean @ precision for mean, precision in zip(self.means, self.precisions, strict=True)
        ]
        biases = [
            -(weight * mean).sum(axis=1) / 2
            for weight, mean in zip(weights, self.means, strict=True)
        ]
        # The mean of n images is farther from everything than the mean of its class, by its noise:
        # without this, small classes are hardly ever predicted.
        noise = self.sizes.mean() / np.maximum(self.counts, 1) / 2
        return np.concatenate(weights, axis=1) / len(weights), np.mean(biases, axis=0) + noise

    def build_new_rows(self, num_old: int) -> tuple[np.ndarray, np.ndarray]:
        """Build rows [L, T * D] and biases [L] of the classes after the first `num_old`.

        They continue the rows of `build_classifier` for the old classes. A new class is as frequent as
        the mean of the old ones; without images, it is never predicted.
        """
        weights, biases = self.compute_discriminants()
        known = np.flatnonzero(self.counts[:num_old])
        new_biases = biases[num_old:] - biases[known].mean() - np.log(len(known))
        new_biases[self.counts[num_old:] == 0] = -np.inf
        return weights[num_old:] - weights[known].mean(axis=0), new_biases

    def compute_distances(self, features: TokenFeatures) -> np.ndarray:
        """Tell known images from unknown: Mahalanobis distance [N] to the nearest mean (arXiv 1807.03888).

        With several tokens, it is the root of the mean of their squared distances. The noise of the
        mean of few images is subtracted, as in the classifier.
        """
        known = self.counts > 0
        squares = []
        for token, mean, precision, size in zip(
            self.tokens, self.means, self.precisions, self.sizes, strict=True
        ):
            values = features[token].astype(np.float64)
            # The square of the difference, multiplied out: an array of all differences [N, K, D]
            # would not fit into memory for many classes.
            own = np.einsum("nd,nd->n", values @ precision, values)[:, None]
            rows = mean[known] @ precision
            of_means = (rows * mean[known]).sum(axis=1) - size / self.counts[known]
            squares.append(own - 2 * values @ rows.T + of_means)
        scaled = np.mean(squares, axis=0) / self.scales[known] ** 2  # [N, K]
        nearest = scaled.min(axis=1)
        # The subtracted noise may leave a negative square next to a mean.
        return np.sqrt(np.maximum(nearest, 0))

    def extend(
        self,
        features: TokenFeatures,
        labels: np.ndarray,
        num_labels: int,
        groups: np.ndarray,
        threshold: float | None,
    ) -> "ClassStatistics":
        """Append the means of `num_labels` further classes; their labels begin with 0.

        With a `threshold` of the distance, each class has a scale: as many of its images as of the
        old classes are closer, each without the images of its group in the mean.
        """
        counts = np.bincount(labels, minlength=num_labels)
        new_means = [compute_means(features[token], labels, counts) for token in self.tokens]
        scales = np.ones(num_labels)
        if threshold:
            distances = pd.Series(self.measure_left_out(features, labels, groups))
            # Interpolated: of a handful of images, the farthest would decide. It skips NaN.
            farthest = distances.groupby(labels).quantile(KNOWN_RECALL)
            scales[farthest.index] = np.fmax(1, farthest / threshold)
        return replace(
            self,
            means=tuple(map(np.concatenate, zip(self.means, new_means, strict=True))),
            counts=np.append(self.counts, counts),
            scales=np.append(self.scales, scales),
        )

    def measure_left_out(
        self, features: TokenFeatures, labels: np.ndarray, groups: np.ndarray
    ) -> np.ndarray:
        """Measure the distance [N] of images from the mean of their class without their group.

        It is NaN for images of the only group of a class. A group has images of one class.
        """
        ones = pd.Series(np.ones(len(labels)))
        num_others = sum_others(ones, labels, groups)
        squares = []
        for token, precision, size in zip(self.tokens, self.precisions, self.sizes, strict=True):
            values = pd.DataFrame(features[token].astype(np.float64))
            means = sum_others(values, labels, groups).div(num_others, axis=0)
            differences = (values - means).to_numpy()
            own = np.einsum("nd,nd->n", differences @ precision, differences)
            squares.append(own - size / num_others)
        return np.sqrt(np.mean(squares, axis=0).clip(0))

    def expand(self, classes: np.ndarray, num_labels: int) -> "ClassStatistics":
        """Expand the statistics of some classes to all labels of a model."""
        means = tuple(expand_rows(mean, classes, num_labels) for mean in self.means)
        counts = expand_rows(self.counts, classes, num_labels)
        return replace(self, means=means, counts=counts, scales=np.ones(num_labels))

    def set_in_model(self, model: Any) -> None:
        """Store the statistics with the weights of a classifier (`model.class_distance`)."""
        model.config.class_statistics = {
            "tokens": [list(token) for token in self.tokens],
            "num_classes": len(self.counts),
        }
        if (self.scales != 1).any():
            model.config.class_statistics["has_scales"] = True
        model.class_distance = ClassDistance(model.config)
        arrays = {
            "counts": self.counts,
            "sizes": self.sizes,
            "scales": self.scales,
            **{f"means_{index}": mean for index, mean in enumerate(self.means)},
            **{f"precisions_{index}": each for index, each in enumerate(self.precisions)},
        }
        model.class_distance.load_state_dict(
            {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()},
            strict=False,  # The digests follow, and models without added classes have no scales
        )
        model.class_distance.to(model.device).claim(model.vitcls)

    @classmethod
    def from_model(cls, model: Any) -> "ClassStatistics | None":
        """Load the statistics that are stored with the weights of a classifier.

        The result is None if it has none, or if they belong to other weights of the encoder.
        """
        stored = getattr(model, "class_distance", None)
        if stored is None or not stored.is_valid:
            return None
        # NumPy has no bfloat16
        arrays = {name: each.double().cpu().numpy() for name, each in stored.state_dict().items()}
        indices = range(len(stored.tokens))
        return cls(
            tokens=tuple(stored.tokens),
            means=tuple(arrays[f"means_{index}"] for index in indices),
            precisions=tuple(arrays[f"precisions_{index}"] for index in indices),
            sizes=arrays["sizes"],
            counts=arrays["counts"].astype(np.int64),
            scales=arrays.get("scales", np.ones(len(arrays["counts"]))),
        )


def sum_others(values: Any, labels: np.ndarray, groups: np.ndarray) -> Any:
    """Sum the values of the images of the same class and of other groups, for each image."""
    return values.groupby(labels).transform("sum") - values.groupby(groups).transform("sum")


def expand_rows(values: np.ndarray, classes: np.ndarray, num_labels: int) -> np.ndarray:
    """Spread values [K, ...] of some classes over all labels [L, ...], with 0 for the others."""
    expanded = np.zeros((num_labels, *values.shape[1:]), values.dtype)
    expanded[classes] = values
    return expanded


def compute_means(values: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average the values [N, D] of each class: [K, D], zeros for a class without images."""
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, labels, values)
    return sums / np.maximum(counts, 1)[:, None]


def build_label_scores(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score several labels per image: weight [L, D] and bias [L].

    The direction of a label is the mean with it minus the mean without it, times the inverse
    covariance of all images, which all labels share: with one covariance per label, few images have
    more log loss. The score of the mean image is 0, and so is every score of a label that all or no
    images have.

    Args:
        values: features [N, D] of a token.
        labels: [N, L] whether an image has a label.
    """
    num_images = len(labels)
    with_label = labels.sum(axis=0)[:, None]
    is_known = (with_label > 0) & (with_label < num_images)
    # The weights of the images in the mean with a label and, negative, in the mean without it
    shares = labels / np.maximum(with_label.T, 1)
    shares -= ~labels / np.maximum(num_images - with_label.T, 1)
    values = values.astype(np.float64)
    center = values.mean(axis=0)
    precision = estimate_precision(
        values - center, np.zeros(num_images, np.int64), np.array([num_images])
    )
    weight = (shares.T @ values) * is_known @ precision
    return weight, -weight @ center


def estimate_precision(residuals: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Estimate the inverse [D, D] of the covariance within the classes; it is symmetric to the bit.

    In the covariance, each class is shrunk towards the variances of its own features, and weighted by its
    images.

    Args:
        residuals: [N, D] differences of the features from the mean of their class.
    """
    width = residuals.shape[1]
    # The only image of a class equals its mean, and says nothing about the covariance.
    num_images = counts[counts > 1].sum()
    weights = np.zeros(len(residuals))  # One weight for each image
    target = np.zeros(width)  # Diagonal
    for label in np.flatnonzero(counts > 1):
        rows = labels == label
        variances = residuals[rows].var(axis=0)
        # A constant feature has residuals of 0, which any scale leaves at 0.
        variances[variances == 0] = 1
        shrinkage, mean_variance = estimate_shrinkage(residuals[rows] / np.sqrt(variances))
        weights[rows] = 1 - shrinkage
        target += counts[label] * shrinkage * mean_variance * variances
    weighted = residuals * np.sqrt(weights / num_images)[:, None]
    diagonal = target / num_images
    # A feature that hardly varies would decide everything by its rounding errors, and with images of
    # one color none of them varies.
    variances = (weighted**2).sum(axis=0) + diagonal
    # The median, because one feature on another scale would dominate a mean
    floor = MIN_RELATIVE_VARIANCE * (np.median(variances) or 1.0)
    diagonal += np.maximum(floor - variances, 0)
    if 2 * len(residuals) < width and diagonal.min() > MIN_RELATIVE_VARIANCE * diagonal.max():
        # With few images, what they add to the inverse of the diagonal takes less time (Woodbury).
        scaled = weighted / diagonal
        root = linalg.cholesky(np.eye(len(residuals)) + scaled @ weighted.T, lower=True)
        part = linalg.solve_triangular(root, scaled, lower=True)
        return np.diag(1 / diagonal) - part.T @ part  # type: ignore[no-any-return]
    precision = linalg.inv(weighted.T @ weighted + np.diag(diagonal))
    # A distance must not depend on the direction, to the last bit.
    return (precision + precision.T) / 2  # type: ignore[no-any-return]


def estimate_shrinkage(values: np.ndarray) -> tuple[float, float]:
    """Estimate Ledoit and Wolf's shrinkage of centered values [n, D]; also return their mean variance.

    The result equals scikit-learn's `ledoit_wolf_shrinkage`, from the smaller of the two matrices
    [n, n] and [D, D] (Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional
    covariance matrices").
    """
    num_values, width = values.shape
    if num_values == 2:  # One difference, whose noise cannot be estimated
        return 1.0, float((values**2).mean())
    norms = (values**2).sum(axis=1)
    mean_variance = norms.sum() / (num_values * width)
    products = values @ values.T if num_values < width else values.T @ values
    squared_norm = (products**2).sum() / num_values**2
    distance = squared_norm / width - mean_variance**2
    noise = ((norms**2).mean() - squared_norm) / (num_values * width)
    if noise <= 0:
        return 0.0, mean_variance
    return min(noise / distance, 1.0) if distance > 0 else 1.0, mean_variance
