"""The linear classifier of frozen features, chosen and measured by cross-validation.

    features of tokens, labels -> folds -> candidates -> lowest log loss -> LinearProbe
                                                      -> out-of-fold predictions -> estimated accuracy

The classifier is shrinkage LDA of each token; the logits of all tokens are averaged
(class_statistics.py). With several labels per image, each label is one against the rest, with one
covariance for all labels and a line that makes its score a probability (targets.py).

Candidates differ in what it reads: the last layer or the last four; CLS, the mean of the patches, or
both (DINOv2's linear evaluation, Oquab et al. 2023, arXiv 2304.07193, appendix B.3). With distillation
tokens, there is a second head that reads them in the same layers (DeiT, Touvron et al. 2021, arXiv
2012.12877), and the logits come from one head or are the mean of both. With 5 to 100
labels per class it is as accurate as logistic regression with the best regularization, and 1 point
better with 200 and 450 (CIFAR-10 at 112 pixels).

The temperature comes from out-of-fold logits. Classifiers of fewer labels are less certain, and the
final one has them all: with ten folds, the temperature is therefore extrapolated to all images, by
how much smaller its logits are (confidence.py).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product, starmap
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_consistent_length
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from ..inference.features import NUM_LAST_LAYERS, Token, Tokens
from ..inference.intervals import estimate_after_choice, estimate_average_precision
from ..inference.metrics import compute_losses, round_floats
from ..runtime.flags import check_value
from ..runtime.progress import track
from .class_statistics import (
    KNOWN_RECALL,
    ClassStatistics,
    TokenFeatures,
    build_label_scores,
    compute_means,
    expand_rows,
)
from .confidence import measure_spread
from .targets import find_target


NUM_FOLDS = 5
NUM_FOLDS_OF_FEW = 10
FEW_IMAGES = 1000  # Maximum number of images for ten folds
MIN_DISTANCE_IMAGES = 100  # With fewer, a handful of images would decide the threshold
POOLING_TEXTS = {
    "cls": "CLS",
    "mean": "mean of the patches",
    "cls_mean": "CLS + mean",
    "own": "the model's own pooling",
}
DISTILLATION = "distillation"  # Kind of the tokens that the second head reads
INFERENCE_TEXTS = {
    "cls": "the CLS head",
    DISTILLATION: "the distillation head",
    "mean": "the mean of both heads",
}

# Distance of a class without training images below the smallest bias, in logits. Finite, because the
# loss of a held-out image of such a class would be infinite otherwise.
ABSENT_CLASS_MARGIN = 100.0

Folds = list[tuple[np.ndarray, np.ndarray]]  # Indices of training and left-out images


@dataclass(frozen=True)
class Candidate:
    """What a classifier reads.

    Attributes:
        layers: negative indices, -1 for the last layer.
        pooling: "cls", "mean", "cls_mean", or "own" for the model's own pooling.
        inference: which of two heads is returned, "cls", "distillation" or "mean"; None if there is one.
    """

    layers: tuple[int, ...]
    pooling: str
    inference: str | None = None

    @property
    def tokens(self) -> Tokens:
        """Tokens in the order in which a classifier with `pooled_layers` reads them."""
        kinds = ("cls", "mean") if self.pooling == "cls_mean" else (self.pooling,)
        return tuple((layer, kind) for layer in self.layers for kind in kinds)

    @property
    def heads(self) -> list[Tokens]:
        """The tokens of each head of the model."""
        if self.inference is None:
            return [self.tokens]
        return [self.tokens, tuple((layer, DISTILLATION) for layer in self.layers)]

    def average(self, logits: Mapping[Token, np.ndarray]) -> np.ndarray:
        """Average the logits of tokens: over the tokens of a head, and over the heads that are returned."""
        heads = [np.mean([logits[each] for each in tokens], axis=0) for tokens in self.heads]
        return self.join(heads)

    def join(self, heads: Sequence[np.ndarray]) -> np.ndarray:
        """Join the logits of the heads to those that are returned."""
        if self.inference == "mean":
            return np.mean(heads, axis=0)
        return heads[-1 if self.inference == DISTILLATION else 0]


def list_candidates(
    features: TokenFeatures,
    layers: Sequence[int] | None,
    pooling: str | None,
    inference: str | None,
) -> list[Candidate]:
    """List the candidates for some features, the simplest first.

    Args:
        features: their tokens.
        layers, pooling: what to read; None to choose.
        inference: which of two heads is returned; None to choose.

    Raises:
        ValueError: if the features lack what to read.
    """
    found = {kind: None for _, kind in features}
    choices = tuple(INFERENCE_TEXTS) if inference is None else (inference,)
    inferences = choices if DISTILLATION in found else (None,)
    kinds = [kind for kind in found if kind != DISTILLATION]
    poolings = [*kinds, "cls_mean"]
    if pooling is not None and "own" not in kinds:
        poolings = [pooling]
    layer_choices = [(-1,), tuple(range(-NUM_LAST_LAYERS, 0))]
    if layers is not None:
        layer_choices = [tuple(layers)]

    candidates = []
    for candidate in starmap(Candidate, product(layer_choices, poolings, inferences)):
        tokens = set(chain(*candidate.heads))
        if tokens and tokens <= features.keys():
            candidates.append(candidate)
    if not candidates:
        raise ValueError(
            f"`layers` or `pooling` names tokens that the features lack. They have {list(features)}: "
            "set both to some of these, or compute features with others"
        )
    return candidates


def describe_candidate(row: Mapping[str, Any]) -> str:
    """Say what a candidate is and reads: "shrinkage LDA on the last 4 layers, CLS + mean"."""
    tokens = POOLING_TEXTS[row["pooling"]]
    if row["pooling"] != "own":  # The model's own pooling also chooses layers
        tokens = f"the {describe_layers(row['layers'])}, {tokens}"
    text = f"shrinkage LDA on {tokens}"
    return f"{text}, {INFERENCE_TEXTS[row['inference']]}" if "inference" in row else text


def describe_inference(losses: Mapping[str, float], images: str) -> str:
    """Say which of two heads a model returns: the one with the lowest log loss, CLS if they are equal."""
    inference = min(losses, key=lambda name: losses[name])
    values = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    return f"the model returns {INFERENCE_TEXTS[inference]} (log loss {images}: {values})"


def describe_layers(layers: Sequence[int]) -> str:
    """Name layers for a reader: "last layer", "layers -6, -2" or "last 4 layers"."""
    if tuple(layers) == (-1,):
        return "last layer"
    if tuple(layers) == tuple(range(-len(layers), 0)):
        return f"last {len(layers)} layers"
    return f"layers {', '.join(map(str, layers))}"


@dataclass(frozen=True)
class Score:
    """Cross-validated result of a candidate.

    The arrays have NaN for images that no fold left out.
    """

    candidate: Candidate
    logits: np.ndarray  # [N, K], calibrated
    temperature: float
    lines: np.ndarray | None  # [2, K] slopes and offsets that calibrate several labels
    losses: np.ndarray  # [N] log loss of the calibrated logits
    is_right: np.ndarray  # Whether each image that a fold left out is predicted right
    row: dict[str, Any]  # Its row in the table of candidates

    @classmethod
    def of(
        cls, candidate: Candidate, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray
    ) -> "Score":
        """Score out-of-fold logits with their best calibration."""
        target = find_target(labels)
        known = ~np.isnan(logits).any(axis=1)
        row: dict[str, Any] = {"layers": list(candidate.layers), "pooling": candidate.pooling}
        if candidate.inference is not None:
            row["inference"] = candidate.inference
        temperature, lines = target.calibrate(logits[known], labels[known], weights[known])
        if lines is None:
            row["temperature"] = temperature
            calibrated = logits / temperature
        else:
            calibrated = logits * lines[0] + lines[1]
        losses = compute_losses(calibrated, labels)
        is_right = target.find_right(target.predict(calibrated[known]), labels[known])
        row["loss"] = float(np.average(losses[known], weights=weights[known]))
        row["accuracy"] = float(is_right.mean())
        return cls(candidate, calibrated, temperature, lines, losses, is_right, row)


class LinearProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A linear classifier of frozen features, which is an estimator of scikit-learn.

    Args:
        layers: negative indices of the layers to read. Default: the last, or the last four.
        pooling: "cls", "mean" or "cls_mean". Default: the best of those in the features.
        class_weight: "balanced" weights each class equally.
        inference: "cls", "distillation" or "mean": which of two heads is returned, if the features have
            distillation tokens. Default: the best of the three.

    Attributes:
        classes_: the labels, in the order of the columns of `predict_proba`.
        candidate_: what was chosen.
        heads_: weight [K, F] and bias [K] of each head, of the logits before the temperature.
        temperature_: divisor of the logits; 1 with several labels. Without folds, the logits at the
            class means have a standard deviation of 1.
        lines_: [2, K] slopes and offsets that have calibrated each of several labels, or None.
        table_: results of all candidates, one row each.
        out_of_fold_: [N, K] probabilities of each image by a classifier that was not fitted to it;
            NaN if every fold needs the image.
        losses_: [N] their log losses.
        estimate_: accuracy, corrected for the choice, or mean average precision of several labels,
            with its interval; None without folds.
        statistics_: class statistics of all images; None for features of unknown tokens, and with
            several labels.
        distance_threshold_: distance within which `KNOWN_RECALL` of the images lie; None if there
            are too few, or no class has three.
        num_folds_: number of folds; 0 if there are too few images for any.

    Example::

        >>> from modeling_vitcls import LinearProbe
        >>> from sklearn.datasets import load_digits
        >>> features, labels = load_digits(return_X_y=True)  # of a model: predict(..., features=["cls"])
        >>> probe = LinearProbe().fit(features[:1000], labels[:1000])
        >>> print(f"{probe.score(features[1000:], labels[1000:]):.2f}")
        0.92

    Several tokens are a dict: ``fit({(-1, "cls"): cls_tokens, (-1, "mean"): means}, labels)``.
    """

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        pooling: str | None = None,
        class_weight: str | None = None,
        inference: str | None = None,
    ) -> None:
        self.layers = layers
        self.pooling = pooling
        self.class_weight = class_weight
        self.inference = inference

    def fit(
        self,
        features: TokenFeatures | np.ndarray,
        labels: np.ndarray,
        groups: np.ndarray | None = None,
        is_counted: np.ndarray | None = None,
    ) -> "LinearProbe":
        """Choose a candidate and fit it to all images.

        Args:
            features: [N, D] of each token, or of one.
            labels: [N], or as a column [N, 1]; for several labels per image, [N, L] of 0 and 1 (a single
                one of them in floats).
            groups: [N]; images of a group are in one fold. Those without one are one group.
            is_counted: [N] whether an image measures the classifier, too: images that were chosen because
                a model was unsure are harder than others, and only train it. Default: all images.

        Raises:
            ValueError: if there are fewer than two images, features are not finite, labels are no
                classes, or `pooling`, `class_weight` or `inference` is unknown.
        """
        if len(labels) < 2:
            raise ValueError("a classifier requires two readable images with labels. Add images")
        # The features of "max" and "attention" are the model's own.
        poolings = None, "max", "attention", *POOLING_TEXTS
        check_value(self, "pooling", self.pooling in poolings, "cls, mean or cls_mean")
        check_value(self, "class_weight", self.class_weight in (None, "balanced"), "balanced")
        check_value(
            self,
            "inference",
            self.inference in (None, *INFERENCE_TEXTS),
            "cls, distillation or mean",
        )
        features = self.read_tokens(features, is_new=True)
        labels = np.asarray(labels)
        if pd.isna(labels).any():
            raise ValueError("the labels of some images are missing. Leave out their rows")
        # A column of a table, as in scikit-learn. Masks of several labels that the runs pass are floats
        if labels.shape[1:] == (1,) and labels.dtype.kind != "f":
            labels = labels.ravel()
        with warnings.catch_warnings():
            # With one or two images of each class, it takes the classes for numbers.
            warnings.simplefilter("ignore")
            check_classification_targets(labels)
        groups = np.arange(len(labels)) if groups is None else pd.factorize(np.asarray(groups))[0]
        check_consistent_length(*features.values(), labels, groups)
        if labels.ndim == 2 and not np.isin(labels, (0, 1)).all():
            raise ValueError(
                "labels [N, L] of several labels per image must be 0 or 1. Pass one label per image as [N]"
            )
        self.target_ = find_target(labels)
        self.classes_, targets = self.target_.encode(labels)
        folds = split_folds(targets, groups)
        self.is_counted_ = np.ones(len(labels), bool) if is_counted is None else is_counted
        if not self.is_counted_.any():
            folds = []
        self.num_folds_ = len(folds)
        candidates = list_candidates(features, self.layers, self.pooling, self.inference)
        logits, distances, spreads = self.cross_validate(features, targets, candidates, folds)
        self.choose(logits, targets, groups)
        self.refit(features, labels)
        self.calibrate(spreads[self.candidate_], features, targets)
        self.distance_threshold_: float | None = None
        # Distances out of fold: an image is closer to a mean that contains it than a new image would
        # be. Pairs have no covariance, in which a photo of another class would be far.
        own = distances.get(choose_statistics_tokens(features, self.candidate_), np.empty(0))
        own = own[np.isfinite(own)]
        if self.has_covariance(targets) and len(own) >= MIN_DISTANCE_IMAGES:
            self.distance_threshold_ = float(np.quantile(own, KNOWN_RECALL, method="higher"))
        return self

    def cross_validate(
        self,
        features: TokenFeatures,
        labels: np.ndarray,
        candidates: Sequence[Candidate],
        folds: Folds,
    ) -> tuple[dict[Candidate, np.ndarray], dict[Tokens, np.ndarray], dict[Candidate, list[float]]]:
        """Predict each image with the classifiers of its fold, which share what is known of a token.

        Returns:
            Logits [N, K] of each candidate, with NaN for images that no fold left out; distances [N] for
            the tokens whose statistics the model of each candidate would store, NaN with several labels,
            as well; and spreads of the logits of each candidate, one for each fold (`measure_spread`),
            none with several labels.
        """
        logits = {each: np.full((len(labels), len(self.classes_)), np.nan) for each in candidates}
        tokens_of_distances = {choose_statistics_tokens(features, each) for each in candidates}
        distances = {each: np.full(len(labels), np.nan) for each in tokens_of_distances if each}
        spreads: dict[Candidate, list[float]] = {each: [] for each in candidates}
        has_covariance = self.has_covariance(labels)
        for train, test in track(folds, "cross-validation", unit="folds"):
            in_fold = {token: values[train] for token, values in features.items()}
            classifiers, statistics = self.fit_tokens(in_fold, labels[train], has_covariance)
            known = test[self.is_counted_[test]]
            if statistics is not None:
                # Groups may keep all images of a class in one fold
                known = known[statistics.counts[labels[known]] > 0]
            left_out = {token: values[known] for token, values in features.items()}
            token_logits = {
                token: left_out[token] @ weight.T + bias
                for token, (weight, bias) in classifiers.items()
            }
            for candidate, own in logits.items():
                own[known] = candidate.average(token_logits)
            if statistics is None:
                continue

            mean_logits = {
                token: statistics.select([token]).compute_mean_logits(*classifier)
                for token, classifier in classifiers.items()
            }
            for candidate, own_spreads in spreads.items():
                own_spreads.append(measure_spread(candidate.average(mean_logits)))
            for tokens, own_distances in distances.items():
                own_distances[known] = statistics.select(tokens).compute_distances(left_out)
        return logits, distances, spreads

    def fit_tokens(
        self, features: TokenFeatures, labels: np.ndarray, has_covariance: bool
    ) -> tuple[dict[Token, tuple[np.ndarray, np.ndarray]], ClassStatistics | None]:
        """Fit weight and bias of each token; also return the statistics of all tokens.

        There are none with several labels, which share the covariance of all images.
        """
        if labels.ndim == 2:
            scores = {
                token: build_label_scores(values, labels) for token, values in features.items()
            }
            return scores, None
        statistics = ClassStatistics.fit(features, labels, len(self.classes_), has_covariance)
        classifiers = {
            token: statistics.select([token]).build_classifier(self.is_balanced)
            for token in features
        }
        return classifiers, statistics

    def choose(
        self,
        logits: Mapping[Candidate, np.ndarray],
        labels: np.ndarray,
        groups: np.ndarray,
    ) -> None:
        """Choose the candidate with the lowest log loss; without folds, the simplest one.

        The logits [N, K] are out of fold.
        """
        self.candidate_, *_ = logits
        self.table_: list[dict[str, Any]] = []
        self.estimate_: dict[str, Any] | None = None
        self.losses_ = np.full(len(labels), np.nan)
        self.out_of_fold_ = np.full((len(labels), len(self.classes_)), np.nan)
        weights = np.ones(len(labels))  # Weight of each image in the log loss
        if self.is_balanced:
            weights = compute_sample_weight("balanced", labels)
        if not self.num_folds_:
            # The probability of each of several labels is its share of the images.
            self.temperature_, self.lines_ = self.target_.calibrate(
                np.zeros_like(self.out_of_fold_), labels, weights
            )
            return

        scores = [Score.of(each, own, labels, weights) for each, own in logits.items()]
        self.table_ = [score.row for score in scores]
        # If losses are equal, the first one wins, because the simplest candidate comes first.
        chosen = min(scores, key=lambda score: score.row["loss"])
        self.candidate_ = chosen.candidate
        self.temperature_, self.lines_ = chosen.temperature, chosen.lines
        self.losses_ = chosen.losses
        known = np.isfinite(chosen.losses)
        self.out_of_fold_[known] = self.target_.to_probabilities(chosen.logits[known])
        if self.lines_ is not None:
            self.estimate_ = estimate_average_precision(
                chosen.logits[known], labels[known], groups[known]
            )
            return
        losses = np.stack([score.losses[known] for score in scores])
        is_right = np.stack([score.is_right for score in scores])
        self.estimate_ = estimate_after_choice(losses * weights[known], is_right, groups[known])

    def refit(self, features: TokenFeatures, labels: np.ndarray) -> None:
        """Fit what was chosen to all images, also to images that took no part in the choice."""
        chosen_classes = self.classes_
        self.classes_, indices = self.target_.encode(labels)
        # Classes that no image of the choice has
        places = np.searchsorted(self.classes_, chosen_classes)
        self.out_of_fold_ = expand_rows(self.out_of_fold_.T, places, len(self.classes_)).T
        tokens: Tokens = ()
        if self.lines_ is None:
            tokens = choose_statistics_tokens(features, self.candidate_)
        heads = self.candidate_.heads
        read = {token: features[token] for token in dict.fromkeys([*tokens, *chain(*heads)])}
        classifiers, statistics = self.fit_tokens(read, indices, self.has_covariance(indices))
        self.heads_ = []
        for head in heads:
            weights, biases = zip(*(classifiers[token] for token in head), strict=True)
            # The mean logits of its tokens, which stand side by side: weight [K, T * D] and bias [K]
            weight = np.concatenate(weights, axis=1) / len(weights)
            self.heads_.append((weight, np.mean(biases, axis=0)))
        if self.lines_ is not None:
            slopes, offsets = self.lines_
            self.heads_ = [
                (weight * slopes[:, None], bias * slopes + offsets) for weight, bias in self.heads_
            ]
        self.statistics_ = statistics.select(tokens) if statistics and tokens else None

    def calibrate(
        self,
        fold_spreads: Sequence[float],
        features: TokenFeatures,
        labels: np.ndarray,
    ) -> None:
        """Extrapolate the temperature from the fold classifiers, with their spreads, to the final one."""
        if self.lines_ is not None or (self.num_folds_ and len(labels) > FEW_IMAGES):
            return
        logits = self.compute_logits(features)
        spread = measure_spread(compute_means(logits, labels, np.bincount(labels)))
        if not self.num_folds_:
            # How often the nearest mean is right is not known, so no probability is near 1.
            self.temperature_ = max(spread, 1.0)
            return

        # With a handful of images per class, the logits of the final classifier are much smaller than in
        # the folds, to which the temperature was fitted (model_cards/studies/first_answer.md). Constant
        # features have no spread.
        if spread > 1e-6:
            self.temperature_ *= min(1.0, spread / np.mean(fold_spreads).item())

    @property
    def is_balanced(self) -> bool:
        return self.class_weight == "balanced"

    def has_covariance(self, labels: np.ndarray) -> bool:
        """Decide whether to estimate a covariance.

        It needs two images of a class in every fold, and folds that calibrate it. Several labels
        have one of all images.
        """
        return bool(self.num_folds_ and labels.ndim == 1 and np.bincount(labels).max() > 2)

    def read_tokens(self, features: Any, is_new: bool = False) -> TokenFeatures:
        """Check features as scikit-learn does: a dict with an entry of each token, or [N, D] of one token.

        Raise ValueError if any is not finite, such as the features of an unreadable image, or, unless
        `is_new`, if the columns are not those of `fit`.
        """
        by_token = features if isinstance(features, Mapping) else {(-1, "own"): features}
        tokens: dict[Token, np.ndarray] = {}
        for token, values in by_token.items():
            tokens[token] = validate_data(self, values, reset=is_new, ensure_all_finite=False)
            is_finite = np.isfinite(tokens[token]).all(axis=1)
            if not is_finite.all():
                raise ValueError(
                    f"the features are not finite for {(~is_finite).sum():,} of {len(is_finite):,} "
                    "images, such as those that cannot be read. Leave out their rows"
                )
        return tokens

    def compute_logits(self, features: TokenFeatures) -> np.ndarray:
        """Compute logits [N, K] before the temperature."""
        heads = zip(self.candidate_.heads, self.heads_, strict=True)
        return self.candidate_.join(
            [stack_tokens(features, tokens) @ weight.T + bias for tokens, (weight, bias) in heads]
        )

    def predict_proba(self, features: TokenFeatures | np.ndarray) -> np.ndarray:
        """Predict probabilities [N, K] from the features [N, D] of each token."""
        check_is_fitted(self)
        return self.target_.to_probabilities(
            self.compute_logits(self.read_tokens(features)) / self.temperature_
        )

    def predict(self, features: TokenFeatures | np.ndarray) -> np.ndarray:
        """Predict the most probable label [N] of each image; of several, those above 0.5: [N, L]."""
        probabilities = self.predict_proba(features)
        if self.lines_ is not None:
            return probabilities > 0.5
        return self.classes_[probabilities.argmax(axis=1)]

    def build_linear(self, num_labels: int, head: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Build the calibrated linear layer of a head for all labels: weight [L, F] and bias [L].

        Labels without images are never predicted.
        """
        weight, own_bias = (each / self.temperature_ for each in self.heads_[head])
        bias = np.full(num_labels, own_bias.min() - ABSENT_CLASS_MARGIN)
        bias[self.classes_] = own_bias
        return expand_rows(weight, self.classes_, num_labels), bias

    def build_record(self, num_images: int) -> dict[str, Any]:
        """Record the choice and the results of all candidates for results.json."""
        candidate = self.candidate_
        record: dict[str, Any] = {
            "num_training_images": num_images,
            "num_folds": self.num_folds_,
            "layers": list(candidate.layers),
            "pooling": candidate.pooling,
        }
        if candidate.inference is not None:
            record["distillation_inference"] = candidate.inference
            record["distillation_losses"] = {
                row["inference"]: row["loss"]
                for row in self.table_
                if (tuple(row["layers"]), row["pooling"]) == (candidate.layers, candidate.pooling)
            }
        if self.estimate_ is not None:
            record |= {**self.estimate_, "loss": float(np.nanmean(self.losses_))}
        return round_floats(record | {"candidates": self.table_})


def choose_statistics_tokens(features: TokenFeatures, candidate: Candidate) -> Tokens:
    """Choose the tokens of which a model stores statistics, among its last layers.

    The patches of the last layer are only among them if the classifier reads them: a model on CLS
    does not compute them.
    """
    unread = {(-1, "mean")} - set(candidate.tokens) if (-1, "cls") in features else set()
    return tuple(
        token
        for token in features
        if token[0] >= -NUM_LAST_LAYERS and token[1] in ("cls", "mean") and token not in unread
    )


def stack_tokens(features: TokenFeatures, tokens: Sequence[Token]) -> np.ndarray:
    """Put the tokens of a classifier side by side, in the order of its weights: [N, T * D]."""
    return np.concatenate([features[token] for token in tokens], axis=1).astype(np.float64)


# Cross-validation ---------------------------------------------------------------------------------


def split_folds(
    labels: np.ndarray,
    groups: np.ndarray,
    num_folds: int | None = None,
    min_classes: int = 2,
) -> Folds:
    """Divide the images into training and left-out images of each fold, stratified by label.

    There are ten folds for at most `FEW_IMAGES` images, otherwise five. Of as few groups, each is a
    fold: together, two could be all groups of a class. Images of classes with one image, or one group
    of images, are in the training images of every fold.

    Args:
        labels: [N] or, for several labels per image, [N, L] of 0 and 1.
        min_classes: number of classes with several images and groups, below which there are no folds.
    """
    from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold, StratifiedKFold

    target = find_target(labels)
    labels = target.find_strata(target.encode(labels)[1])
    if num_folds is None:
        num_folds = NUM_FOLDS_OF_FEW if len(labels) <= FEW_IMAGES else NUM_FOLDS
    # Numbered in the order of the images, whatever the numbers were; images without a group are one
    groups = pd.factorize(groups)[0]
    is_grouped = groups.max() + 1 < len(labels)
    num_groups = np.array(
        [len(np.unique(groups[labels == label])) for label in range(labels.max() + 1)]
    )
    # If the only group of a class were left out, its fold would not know the class. It always
    # trains.
    single = np.flatnonzero(num_groups[labels] < 2)
    several = np.flatnonzero(num_groups[labels] > 1)
    if num_groups.max() < 2 or (num_groups > 1).sum() < min_classes:
        return []
    kind: Any = StratifiedGroupKFold if is_grouped else StratifiedKFold
    splitter = kind(min(num_folds, num_groups.max()), shuffle=True, random_state=0)
    if is_grouped and len(np.unique(groups[several])) <= num_folds:
        splitter = LeaveOneGroupOut()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer images than folds
        parts = list(splitter.split(several, labels[several], groups[several]))
    return [(np.concatenate([several[train], single]), several[test]) for train, test in parts]
