"""Choice and fit of a linear classifier on features: layers, tokens, scale, regularization.

    features of all layers [N, layers, kinds, D] -> candidates -> stratified cross-validation -> `ProbeChoice`
                                                 -> logistic regression on all images -> weight, bias

The candidates are those of DINOv2's linear evaluation (Oquab et al. 2023, arXiv 2304.07193,
appendix B.3: the last layer or the last four, CLS or CLS and the mean of the patches), and single
layers. They differ in size, so each is compared by its log loss on images that its regression was
not fitted to. The simplest candidate that is not clearly worse than the best wins (the
one-standard-error rule of Breiman et al. 1984, section 3.4.3, with paired differences).

L2 regularization does not depend on the basis of the features. With fewer images than features,
they are therefore rotated to as many numbers as there are images, which changes no result and makes
the fits fast.

This file works on NumPy arrays, without images and models. frozen_features.py computes the
features.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax


NUM_FOLDS = 5
NUM_LAST_LAYERS = 4  # of the largest candidate
LAST_CLS_MEAN = "last_cls_mean"  # tokens of a candidate with several layers
LAST_CLS_INNER_MEAN = "last_cls_inner_mean"  # the same without the patches of the last layer
# by the number of vectors
TOKEN_ORDER = ("own", "cls", "mean", LAST_CLS_INNER_MEAN, LAST_CLS_MEAN, "cls_mean")
NUM_SINGLE_LAYERS = 6  # the last ones, each of which is a candidate
# Inverse strengths of the regularization, for features that are scaled to a mean squared norm of 1
STRENGTHS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)
DEFAULT_STRENGTH = 64.0  # if there are too few images for a choice
MAX_ITERATIONS = 300
MAX_PILOT_IMAGES = 1000  # of the first fold, which all candidates run
# standard errors behind the best after the first fold, from which a candidate is not continued
STOP_MARGIN = 2.0
# directions in which features vary less, relative to the largest, are dropped
RANK_TOLERANCE = 1e-10
# difference of a class without training images to the smallest bias, in logits
ABSENT_CLASS_MARGIN = 100.0


@dataclass(frozen=True)
class Candidate:
    """What a linear classifier reads.

    Attributes:
        layers: negative indices, -1 for the last layer.
        tokens: "cls", "mean", "cls_mean", "last_cls_mean" for the last layer's CLS token and the
            means of all layers, "last_cls_inner_mean" for the last layer's CLS token and the means
            of the other layers, or "own" for the model's own pooling.
        scale: "raw", or "standardized" for features with a standard deviation of 1.
    """

    layers: tuple[int, ...]
    tokens: str
    scale: str

    @property
    def complexity(self) -> tuple[int, ...]:
        """Return a key by which the default comes first.

        The default is the last layer, CLS (or the only kind of tokens), raw.

        A single layer other than the last comes after the last four: it must be better than both.
        """
        is_inner_layer = self.layers[-1] != -1
        num_vectors = TOKEN_ORDER.index(self.tokens)
        return (
            is_inner_layer,
            len(self.layers),
            abs(self.layers[-1]),
            num_vectors,
            self.scale != "raw",
        )

    @property
    def pooling(self) -> str:
        """Return `config.pooling` of a model whose classifier reads the candidate.

        The classifier has zeros for what the candidate does not read.
        """
        return "cls_mean" if self.tokens in (LAST_CLS_MEAN, LAST_CLS_INNER_MEAN) else self.tokens

    @property
    def layer_poolings(self) -> list[str]:
        """Return the pooling of each layer, of an extra head that reads exactly the candidate."""
        poolings = {LAST_CLS_MEAN: ("mean", "cls_mean"), LAST_CLS_INNER_MEAN: ("mean", "cls")}
        inner, last = poolings.get(self.tokens, (self.tokens, self.tokens))
        return [last if layer == -1 else inner for layer in self.layers]

    @property
    def reads_last_patches(self) -> bool:
        """Return whether the candidate reads the patches of the last layer."""
        return self.layers[-1] == -1 and self.layer_poolings[-1] != "cls"


TOKEN_TEXTS = {
    "cls": "CLS",
    "mean": "mean of the patches",
    "cls_mean": "CLS + mean",
    LAST_CLS_MEAN: "last CLS + means",
    LAST_CLS_INNER_MEAN: "last CLS + inner means",
    "own": "the model's own pooling",
}


def describe_candidate(row: Mapping[str, Any]) -> str:
    """Return a row of results.json as text: "last 4 layers, CLS + mean, raw, C 64"."""
    layers = describe_layers(row["layers"])
    return f"{layers}, {TOKEN_TEXTS[row['tokens']]}, {row['scale']}, C {row['strength']:g}"


def describe_layers(layers: Sequence[int]) -> str:
    """Return "last layer", "layer -3" or "last 4 layers"."""
    if tuple(layers) == (-1,):
        return "last layer"
    return f"layer {layers[0]}" if len(layers) == 1 else f"last {len(layers)} layers"


@dataclass(frozen=True)
class Score:
    """Cross-validated result of a candidate, with its best strength.

    Arrays have one entry per image.
    """

    candidate: Candidate
    strength: float
    # [N] log loss of each image in the fold that leaves it out; NaN if the fold was not run
    losses: np.ndarray
    logits: np.ndarray  # [N, L], out of fold; NaN if the fold was not run

    @property
    def is_complete(self) -> bool:
        """Whether every fold was run."""
        return bool(np.isfinite(self.losses).all())


@dataclass(frozen=True)
class LinearClassifier:
    """Logits are `features @ weight.T + bias`.

    Classes without training images are never predicted.
    """

    weight: np.ndarray  # [L, F] float32
    bias: np.ndarray  # [L] float32


@dataclass(frozen=True)
class ProbeChoice:
    """The chosen candidate and its strength, and the results of all candidates.

    Without cross-validation, for which there were too few images, `score` is None and `scores` is
    empty.
    """

    candidate: Candidate
    strength: float
    score: Score | None = None
    scores: tuple[Score, ...] = ()


# Candidates ---------------------------------------------------------------------------------------


def list_candidates(
    num_layers: int,
    layers: Sequence[int] | None = None,
    tokens: Sequence[str] = ("cls", "cls_mean"),
) -> list[Candidate]:
    """Return the candidates, the simplest first.

    Args:
        num_layers: number of layers with features, counted from the last.
        layers: the layers to read, if they are given. Default: the last, the last four, and each
            other layer.
        tokens: kinds of tokens to choose from.
    """
    if layers is not None:
        layer_choices = [tuple(layers)]
    else:
        layer_choices = [(-index,) for index in range(1, min(num_layers, NUM_SINGLE_LAYERS) + 1)]
        if num_layers >= NUM_LAST_LAYERS:
            layer_choices.append(tuple(range(-NUM_LAST_LAYERS, 0)))

    candidates = []
    for each in layer_choices:
        kinds = list(tokens)
        if len(each) > 1 and each[-1] == -1 and len(tokens) > 1:
            kinds.append(LAST_CLS_MEAN)
        candidates += [
            Candidate(each, kind, scale) for kind in kinds for scale in ("raw", "standardized")
        ]
    return sorted(candidates, key=lambda candidate: candidate.complexity)


# Scaling and rotation -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Transform:
    """Centers, scales and rotates features [N, F] to [N, min(N, F)].

    They are only rotated if there are more features than images.
    """

    mean: np.ndarray  # [F]
    scale: np.ndarray  # [F]
    rotation: np.ndarray | None  # [F, R]

    @classmethod
    def fit(cls, features: np.ndarray, scale: str) -> "Transform":
        """Fit the transform to features [N, F]; afterwards, their mean squared norm is 1."""
        mean = features.mean(axis=0)
        centered = features - mean
        deviations = centered.std(axis=0)
        divisor = np.ones_like(deviations)
        if scale == "standardized":
            divisor = np.where(deviations > 1e-6 * deviations.max(initial=0.0), deviations, np.inf)
        centered = centered / divisor
        norm = np.sqrt((centered**2).sum(axis=1).mean())
        divisor = divisor * (norm if norm > 0 else 1.0)

        rotation = None
        if len(features) < features.shape[1]:
            scaled = (features - mean) / divisor
            # faster than an SVD of the features
            values, vectors = np.linalg.eigh(scaled @ scaled.T)
            is_used = values > RANK_TOLERANCE * values.max(initial=0.0)
            rotation = scaled.T @ (vectors[:, is_used] / np.sqrt(values[is_used]))
        return cls(mean, divisor, rotation)

    def apply(self, features: np.ndarray) -> np.ndarray:
        scaled = (features - self.mean) / self.scale
        return scaled if self.rotation is None else scaled @ self.rotation

    def fold(
        self, coefficients: np.ndarray, intercepts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the weight [L, F] and the bias [L] for features without the transform.

        They give the same logits.
        """
        if self.rotation is not None:
            coefficients = coefficients @ self.rotation.T
        weight = coefficients / self.scale
        return weight, intercepts - weight @ self.mean


# Regression ---------------------------------------------------------------------------------------


class AllRows:
    """scikit-learn's logistic regression; each fit continues from the last solution."""

    def __init__(self, num_labels: int) -> None:
        from sklearn.linear_model import LogisticRegression

        self.num_labels = num_labels
        self.regression = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)

    def fit(
        self, features: np.ndarray, labels: np.ndarray, strength: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the weight [L, F] and the bias [L] for features [N, F] and labels [N]."""
        regression = self.regression.set_params(C=strength).fit(features, labels)
        coefficients = regression.coef_
        intercepts = regression.intercept_
        if len(regression.classes_) == 2:  # the sigmoid of z is the softmax of [-z / 2, z / 2]
            coefficients = np.concatenate([-coefficients, coefficients]) / 2
            intercepts = np.concatenate([-intercepts, intercepts]) / 2

        weight = np.zeros((self.num_labels, coefficients.shape[1]))
        bias = np.full(self.num_labels, intercepts.min() - ABSENT_CLASS_MARGIN)
        weight[regression.classes_] = coefficients
        bias[regression.classes_] = intercepts
        return weight, bias


class AddedRows:
    """Logistic regression of new classes, with fixed logits for the old classes.

    The loss and the parameter C are those of scikit-learn's `LogisticRegression`:

        C * sum(cross-entropy([old logits, features @ weight.T + bias])) + norm(weight)**2 / 2

    Args:
        old_logits: [N, C] of the images that the rows are fitted to.
    """

    def __init__(self, num_labels: int, old_logits: np.ndarray) -> None:
        self.old_logits = old_logits
        self.num_new = num_labels - old_logits.shape[1]
        self.solution: np.ndarray | None = None  # [K * (F + 1)], from which the next fit continues

    def fit(
        self, features: np.ndarray, labels: np.ndarray, strength: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the weight [K, F] and the bias [K] of the new classes, as `AllRows.fit`."""
        num_old = self.old_logits.shape[1]
        padded = np.concatenate([features, np.ones((len(features), 1))], axis=1)  # [N, F + 1]
        targets = np.eye(num_old + self.num_new)[labels][:, num_old:]  # [N, K]
        rows = np.arange(len(labels))

        def compute_loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            solution = flat.reshape(self.num_new, -1)  # [K, F + 1]
            # [N, C + K]
            log_probabilities = log_softmax(
                np.concatenate([self.old_logits, padded @ solution.T], axis=1), axis=1
            )
            loss = (
                -strength * log_probabilities[rows, labels].sum()
                + (solution[:, :-1] ** 2).sum() / 2
            )
            gradient = strength * (np.exp(log_probabilities[:, num_old:]) - targets).T @ padded
            gradient[:, :-1] += solution[:, :-1]
            return loss, gradient.ravel()

        if self.solution is None:
            self.solution = np.zeros(self.num_new * padded.shape[1])
        self.solution = minimize(
            compute_loss,
            self.solution,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MAX_ITERATIONS},
        ).x
        weight_and_bias = self.solution.reshape(self.num_new, -1)
        return weight_and_bias[:, :-1], weight_and_bias[:, -1]


def build_regression(num_labels: int, old_logits: np.ndarray | None) -> AllRows | AddedRows:
    """Return the regression of all classes, or of those that are not in `old_logits` [N, C]."""
    return AllRows(num_labels) if old_logits is None else AddedRows(num_labels, old_logits)


def fit_classifier(
    features: np.ndarray,
    labels: np.ndarray,
    num_labels: int,
    scale: str,
    strength: float,
    old_logits: np.ndarray | None = None,
) -> LinearClassifier:
    """Fit a regression to features [N, F] and labels [N], and fold the scaling into it.

    With the logits [N, C] of old classes, the classifier has only the rows of the new classes.
    """
    transform = Transform.fit(features, scale)
    regression = build_regression(num_labels, old_logits)
    weight, bias = transform.fold(*regression.fit(transform.apply(features), labels, strength))
    return LinearClassifier(weight.astype(np.float32), bias.astype(np.float32))


# Cross-validation
# --------------------------------------------------------------------------------------------------


def split_folds(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return indices of training and validation images for each of five folds, stratified by class.

    The only image of a class is in the training images of every fold.
    """
    from sklearn.model_selection import StratifiedKFold

    classes, counts = np.unique(labels, return_counts=True)
    single = np.flatnonzero(np.isin(labels, classes[counts < 2]))
    several = np.flatnonzero(~np.isin(labels, classes[counts < 2]))
    if len(several) < NUM_FOLDS or len(np.unique(labels[several])) < 2:
        return []
    num_folds = min(NUM_FOLDS, counts.max())
    splitter = StratifiedKFold(num_folds, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer images than folds
        parts = list(splitter.split(several, labels[several]))
    return [(np.concatenate([several[train], single]), several[test]) for train, test in parts]


class CrossValidation:
    """Cross-validation of one candidate, fold by fold.

    The first fold tries all strengths. The other folds try the best of them and its two neighbors.
    """

    def __init__(
        self,
        candidate: Candidate,
        features: np.ndarray,
        labels: np.ndarray,
        num_labels: int,
        old_logits: np.ndarray | None = None,
    ) -> None:
        self.candidate = candidate
        self.labels = labels
        self.num_labels = num_labels
        self.old_logits = old_logits
        # The scale and the rotation see no labels, so that one of each serves all folds.
        self.features = Transform.fit(features, candidate.scale).apply(features)
        self.strengths: tuple[float, ...] = STRENGTHS
        shape = (len(STRENGTHS), len(labels), num_labels)
        self.logits = np.full(shape, np.nan)  # NaN: not predicted

    def run_fold(self, train: np.ndarray, test: np.ndarray) -> None:
        """Fit the regressions to the images `train`, and predict the images `test`.

        The most regularized one is the first.
        """
        old_logits = self.old_logits
        regression = build_regression(
            self.num_labels, None if old_logits is None else old_logits[train]
        )
        for strength in self.strengths:
            weight, bias = regression.fit(self.features[train], self.labels[train], strength)
            logits = self.features[test] @ weight.T + bias
            if old_logits is not None:
                logits = np.concatenate([old_logits[test], logits], axis=1)
            self.logits[STRENGTHS.index(strength), test] = logits

        if self.strengths is STRENGTHS:
            best = int(np.nanmean(self.compute_losses(), axis=1).argmin())
            self.strengths = STRENGTHS[max(best - 1, 0) : best + 2]

    def compute_losses(self) -> np.ndarray:
        """Return the log loss of each image for each strength, NaN where it was not computed."""
        log_probabilities = log_softmax(self.logits, axis=2)  # [strengths, N, L]
        return -log_probabilities[:, np.arange(len(self.labels)), self.labels]

    def get_score(self) -> Score:
        """Return the result with the best strength."""
        losses = self.compute_losses()
        tried = [STRENGTHS.index(strength) for strength in self.strengths]
        best = min(tried, key=lambda index: np.nanmean(losses[index]))
        return Score(self.candidate, STRENGTHS[best], losses[best], self.logits[best])


def choose_probe(
    select: Callable[[Candidate], np.ndarray],
    labels: np.ndarray,
    num_labels: int,
    candidates: Sequence[Candidate],
    old_logits: np.ndarray | None = None,
) -> ProbeChoice:
    """Choose a candidate by cross-validation.

    All candidates run the first fold; those that are clearly behind are not continued. Of the
    others, the simplest that is at most one standard error worse than the best is chosen.

    Args:
        select: returns the features [N, F] that a candidate reads.
        labels: class indices [N].
        num_labels: number of classes of the model, L.
        candidates: as returned by `list_candidates`, the simplest first.
        old_logits: [N, C] of the old classes, if only the other classes are fitted.
    """
    folds = split_folds(labels)
    if not folds:  # too few images: the default
        return ProbeChoice(candidates[0], DEFAULT_STRENGTH)
    first_train, first_test = folds[0]
    pilot_train = first_train[:MAX_PILOT_IMAGES]
    pilot_test = first_test[:MAX_PILOT_IMAGES]

    runs = []
    for candidate in candidates:
        run = CrossValidation(candidate, select(candidate), labels, num_labels, old_logits)
        run.run_fold(pilot_train, pilot_test)
        runs.append(run)
    scores = [run.get_score() for run in runs]
    best = min(scores, key=lambda score: np.nanmean(score.losses))

    complete_scores = []
    for index, (run, score) in enumerate(zip(runs, scores, strict=True)):
        if is_clearly_worse(score.losses[pilot_test], best.losses[pilot_test], STOP_MARGIN):
            continue
        remaining = folds if len(pilot_train) < len(first_train) else folds[1:]
        for train, test in remaining:
            run.run_fold(train, test)
        scores[index] = run.get_score()
        complete_scores.append(scores[index])

    best = min(complete_scores, key=lambda score: np.nanmean(score.losses))
    chosen = next(
        score for score in complete_scores if not is_clearly_worse(score.losses, best.losses, 1.0)
    )
    return ProbeChoice(chosen.candidate, chosen.strength, chosen, tuple(scores))


def is_clearly_worse(losses: np.ndarray, best_losses: np.ndarray, num_errors: float) -> bool:
    """Return whether the mean of `losses` is more than `num_errors` standard errors above the best.

    The losses are of the same images, so that the error is that of their differences.
    """
    differences = losses - best_losses
    differences = differences[np.isfinite(differences)]  # without the only image of a class
    return differences.mean() > num_errors * differences.std() / math.sqrt(len(differences))
