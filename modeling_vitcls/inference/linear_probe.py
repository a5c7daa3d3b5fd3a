"""Linear classifiers of frozen features, chosen and measured by cross-validation.

    features of tokens, labels -> folds -> candidates -> lowest log loss -> LinearProbe
                                                      -> out-of-fold predictions -> estimated accuracy

candidates            one linear layer on the concatenated tokens
lda                   shrinkage LDA of each token, logits averaged (class_statistics.py)
logistic              logistic regression, with a strength chosen by the same folds

Both read the last layer or the last four; CLS, the mean of the patches, or both (DINOv2's linear
evaluation, Oquab et al. 2023, arXiv 2304.07193, appendix B.3). In the study of first answers, LDA
was 2 to 8 points better than the regression with 20 to 100 labels per class; the regression serves
many labels, for which one covariance is too simple.

The temperature comes from out-of-fold logits. With ten folds it is extrapolated to all images from
that of five: classifiers of fewer labels are less certain, and the final one has them all.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import log_softmax, softmax

from .class_statistics import ClassStatistics, Token, TokenFeatures
from .confidence import fit_temperature
from .intervals import Estimate, estimate_after_choice


NUM_LAST_LAYERS = 4  # of the largest candidate
FEW_IMAGES = 1000  # up to which ten folds are run, and no candidate is dropped after the first
NUM_FOLDS, NUM_FOLDS_OF_FEW = 5, 10
# inverse strengths of the regularization, for features that are scaled to a mean squared norm of 1
STRENGTHS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
DEFAULT_STRENGTH = 64.0  # if there are too few images for a choice
MAX_ITERATIONS = 300
STOP_MARGIN = 2.0  # standard errors behind the best after the first fold, beyond `FEW_IMAGES`
# directions in which features vary less, relative to the largest, are dropped
RANK_TOLERANCE = 1e-10
KNOWN_RECALL = 0.95  # fraction of training images within the distance threshold
MIN_DISTANCE_IMAGES = 100  # with fewer, the threshold would be that of a handful of images
POOLING_TEXTS = {
    "cls": "CLS",
    "mean": "mean of the patches",
    "cls_mean": "CLS + mean",
    "own": "the model's own pooling",
}
HEAD_TEXTS = {"lda": "shrinkage LDA", "logistic": "logistic regression"}

Folds = list[tuple[np.ndarray, np.ndarray]]  # indices of training and left-out images


@dataclass(frozen=True)
class Candidate:
    """A kind of linear classifier, and what it reads.

    Attributes:
        head: "lda" or "logistic".
        layers: negative indices, -1 for the last layer.
        pooling: "cls", "mean", "cls_mean", or "own" for the model's own pooling.
    """

    head: Literal["lda", "logistic"]
    layers: tuple[int, ...]
    pooling: str

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Return the tokens in the order in which a classifier with `pooled_layers` reads them."""
        kinds = ("cls", "mean") if self.pooling == "cls_mean" else (self.pooling,)
        return tuple((layer, kind) for layer in self.layers for kind in kinds)


def list_candidates(
    features: TokenFeatures, layers: Sequence[int] | None = None, pooling: str | None = None
) -> list[Candidate]:
    """Return the candidates for some features, the simplest first.

    Args:
        features: their tokens.
        layers, pooling: what to read, if it is given.
    """
    kinds = list(dict.fromkeys(kind for _, kind in features))
    poolings = [*kinds, "cls_mean"] if len(kinds) == 2 else kinds
    if pooling is not None and pooling in (*kinds, "cls_mean"):
        poolings = [pooling]

    layer_choices: list[tuple[int, ...]] = [(-1,)]
    if layers is not None:
        layer_choices = [tuple(layers)]
    elif min(layer for layer, _ in features) <= -NUM_LAST_LAYERS:
        layer_choices.append(tuple(range(-NUM_LAST_LAYERS, 0)))

    candidates = [Candidate("lda", each, kind) for each in layer_choices for kind in poolings]
    simplest = Candidate("logistic", layer_choices[0], poolings[0])
    largest = Candidate("logistic", layer_choices[-1], poolings[-1])
    return [*candidates, *dict.fromkeys([simplest, largest])]


def describe_candidate(row: Mapping[str, Any]) -> str:
    """Return a row of results.json as text: "shrinkage LDA on the last 4 layers, CLS + mean"."""
    layers = describe_layers(row["layers"])
    text = f"{HEAD_TEXTS[row['head']]} on the {layers}, {POOLING_TEXTS[row['pooling']]}"
    return text if row["strength"] is None else f"{text}, C {row['strength']:g}"


def describe_layers(layers: Sequence[int]) -> str:
    """Return "last layer", "layers -6, -2" or "last 4 layers"."""
    if tuple(layers) == (-1,):
        return "last layer"
    if tuple(layers) == tuple(range(-len(layers), 0)):
        return f"last {len(layers)} layers"
    return f"layers {', '.join(map(str, layers))}"


@dataclass(frozen=True)
class Score:
    """Cross-validated result of a candidate with one strength.

    The arrays have NaN for images that no fold left out.
    """

    candidate: Candidate
    strength: float | None
    logits: np.ndarray  # [N, K], before the temperature
    temperature: float
    losses: np.ndarray  # [N] log loss after the temperature
    is_right: np.ndarray  # [N]

    def build_record(self, weights: np.ndarray) -> dict[str, Any]:
        """Return a row of the table of candidates."""
        known = np.isfinite(self.losses)
        return {
            "head": self.candidate.head,
            "layers": list(self.candidate.layers),
            "pooling": self.candidate.pooling,
            "strength": self.strength,
            "temperature": self.temperature,
            "loss": float(np.average(self.losses[known], weights=weights[known])),
            "accuracy": float(np.average(self.is_right[known])),
        }


class LinearProbe:
    """A linear classifier of frozen features in the protocol of scikit-learn.

    Args:
        layers: negative indices of the layers to read. Default: the last, or the last four.
        pooling: "cls", "mean" or "cls_mean". Default: the best of those in the features.

    Attributes:
        classes_: the labels, in the order of the columns of `predict_proba`.
        candidate_, strength_: what was chosen.
        weight_, bias_: [K, F] and [K] of the logits before the temperature.
        temperature_: divisor of the logits.
        table_: results of all candidates, one row each.
        out_of_fold_: [N, K] probabilities of each image by a classifier that was not fitted to it;
            NaN if every fold needs the image.
        losses_: [N] their log losses.
        estimate_: accuracy, corrected for the choice, with its interval; None without folds.
        statistics_: class statistics of all images; None if no class has two images.
        distance_threshold_: distance within which `KNOWN_RECALL` of the images lie; None if there
            are too few.
        num_folds_: number of folds; 0 if there are too few images for any.

    Example::

        probe = LinearProbe().fit({(-1, "cls"): cls_tokens, (-1, "mean"): means}, labels)
        probabilities = probe.predict_proba({(-1, "cls"): other_tokens, (-1, "mean"): other_means})
    """

    def __init__(self, layers: Sequence[int] | None = None, pooling: str | None = None) -> None:
        self.layers = layers
        self.pooling = pooling

    def fit(
        self,
        features: TokenFeatures | np.ndarray,
        labels: np.ndarray,
        groups: np.ndarray | None = None,
        class_weight: str | None = None,
    ) -> "LinearProbe":
        """Choose a candidate and fit it to all images.

        Args:
            features: [N, D] of each token, or of one.
            labels: [N].
            groups: [N]; images of a group are in one fold.
            class_weight: "balanced" weights each class equally.
        """
        features = to_tokens(features)
        self.classes_, labels = np.unique(labels, return_inverse=True)
        validation = CrossValidation(features, labels, groups, class_weight == "balanced")
        candidates = list_candidates(features, self.layers, self.pooling)
        folds = split_folds(labels, groups)
        if not have_pairs(labels, folds):
            candidates = [each for each in candidates if each.head == "logistic"]

        self.num_folds_ = len(folds)
        self.table_: list[dict[str, Any]] = []
        self.estimate_: Estimate | None = None
        self.strength_: float | None = DEFAULT_STRENGTH
        self.temperature_ = 1.0
        self.losses_ = np.full(len(labels), np.nan)
        self.is_balanced_ = validation.is_balanced
        self.out_of_fold_ = np.full((len(labels), len(self.classes_)), np.nan)
        distances: dict[tuple[Token, ...], np.ndarray] = {}
        if not folds:
            self.candidate_ = next(each for each in candidates if each.head == "logistic")
        else:
            scores, distances = validation.compare(candidates, folds)
            rows = [score.build_record(validation.weights) for score in scores]
            best = int(np.argmin([row["loss"] for row in rows]))
            chosen = scores[best]
            self.candidate_, self.strength_ = chosen.candidate, chosen.strength
            self.table_ = keep_best_rows(rows)
            self.losses_ = chosen.losses
            known = np.isfinite(chosen.losses)
            self.out_of_fold_[known] = softmax(chosen.logits[known] / chosen.temperature, axis=1)
            self.estimate_ = estimate_after_choice(
                losses=np.stack([score.losses[known] for score in scores]),
                is_right=np.stack([score.is_right[known] for score in scores]),
                weights=validation.weights[known],
                groups=None if groups is None else groups[known],
            )
            self.temperature_ = validation.extrapolate_temperature(chosen, folds)

        self.weight_, self.bias_ = validation.fit(
            self.candidate_, self.strength_, np.arange(len(labels))
        )
        self.fit_statistics(features, labels)
        known = distances.get(choose_statistics_tokens(features, self.candidate_), np.zeros(0))
        known = known[np.isfinite(known)]
        self.distance_threshold_ = None
        if len(known) >= MIN_DISTANCE_IMAGES:
            self.distance_threshold_ = float(np.quantile(known, KNOWN_RECALL, method="higher"))
        return self

    def refit(self, features: TokenFeatures, labels: np.ndarray) -> "LinearProbe":
        """Fit what was chosen to all images: those of the choice, and others."""
        self.classes_, labels = np.unique(labels, return_inverse=True)
        validation = CrossValidation(features, labels, None, self.is_balanced_)
        self.weight_, self.bias_ = validation.fit(
            self.candidate_, self.strength_, np.arange(len(labels))
        )
        self.fit_statistics(features, labels)
        return self

    def fit_statistics(self, features: TokenFeatures, labels: np.ndarray) -> None:
        """Compute the class statistics that a model stores."""
        self.statistics_ = None
        tokens = choose_statistics_tokens(features, self.candidate_)
        if tokens and np.bincount(labels).max() > 1:
            self.statistics_ = ClassStatistics.fit(
                {token: features[token] for token in tokens}, labels, len(self.classes_)
            )

    def predict_proba(self, features: TokenFeatures | np.ndarray) -> np.ndarray:
        """Return the probabilities [N, K] of features [N, D] of each token."""
        logits = (
            stack_tokens(to_tokens(features), self.candidate_.tokens) @ self.weight_.T + self.bias_
        )
        return softmax(logits / self.temperature_, axis=1)

    def predict(self, features: TokenFeatures | np.ndarray) -> np.ndarray:
        """Return the most probable label [N] of each image."""
        return self.classes_[self.predict_proba(features).argmax(axis=1)]

    def score(self, features: TokenFeatures | np.ndarray, labels: np.ndarray) -> float:
        """Return the accuracy."""
        return float((self.predict(features) == labels).mean())


def to_tokens(features: TokenFeatures | np.ndarray) -> TokenFeatures:
    """Return features [N, D] as those of one token."""
    return {(-1, "own"): features} if isinstance(features, np.ndarray) else features


def keep_best_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each candidate, with its best strength, in the order of the candidates."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["head"], *row["layers"], row["pooling"])
        if key not in best or row["loss"] < best[key]["loss"]:
            best[key] = row
    return list(best.values())


def choose_statistics_tokens(features: TokenFeatures, candidate: Candidate) -> tuple[Token, ...]:
    """Return the tokens of the last layers, of which a model stores statistics.

    The patches of the last layer are only among them if the classifier reads them: a model on CLS
    does not compute them.
    """
    unread = {(-1, "mean")} - set(candidate.tokens) if (-1, "cls") in features else set()
    return tuple(
        token
        for token in features
        if token[0] >= -NUM_LAST_LAYERS and token[1] != "own" and token not in unread
    )


def stack_tokens(features: TokenFeatures, tokens: Sequence[Token]) -> np.ndarray:
    """Return the features [N, T * D] that a classifier of some tokens reads."""
    return np.concatenate([features[token] for token in tokens], axis=1).astype(np.float64)


# Cross-validation ---------------------------------------------------------------------------------


def split_folds(
    labels: np.ndarray, groups: np.ndarray | None = None, num_folds: int | None = None
) -> Folds:
    """Return training and left-out images of each fold, stratified by class.

    There are ten folds for at most `FEW_IMAGES` images, otherwise five. Images of classes with
    one image, or one group of images, are in the training images of every fold.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if num_folds is None:
        num_folds = NUM_FOLDS_OF_FEW if len(labels) <= FEW_IMAGES else NUM_FOLDS
    if groups is None or len(np.unique(groups)) == len(groups):
        groups = np.arange(len(labels))
        splitter: Any = StratifiedKFold
    else:
        groups = np.unique(groups, return_inverse=True)[1]
        splitter = StratifiedGroupKFold
    num_groups = np.array(
        [len(np.unique(groups[labels == label])) for label in range(labels.max() + 1)]
    )
    single = np.flatnonzero(num_groups[labels] < 2)
    several = np.flatnonzero(num_groups[labels] > 1)
    num_folds = min(num_folds, num_groups.max())
    if num_folds < 2 or (num_groups > 1).sum() < 2:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer images than folds
        parts = list(
            splitter(num_folds, shuffle=True, random_state=0).split(
                several, labels[several], groups[several]
            )
        )
    return [(np.concatenate([several[train], single]), several[test]) for train, test in parts]


def have_pairs(labels: np.ndarray, folds: Folds) -> bool:
    """Return whether a class has two training images in every fold, which a covariance needs."""
    return all(np.bincount(labels[train]).max() > 1 for train, _ in folds)


class CrossValidation:
    """The candidates' fits to parts of the images."""

    def __init__(
        self,
        features: TokenFeatures,
        labels: np.ndarray,
        groups: np.ndarray | None,
        is_balanced: bool,
    ) -> None:
        self.features = features
        self.labels = labels
        self.groups = groups
        self.is_balanced = is_balanced
        self.num_labels = labels.max() + 1
        self.weights = np.ones(len(labels))  # of each image in the log loss
        if is_balanced:
            counts = np.bincount(labels)
            self.weights = (len(labels) / len(counts) / counts)[labels]

    def compare(
        self, candidates: Sequence[Candidate], folds: Folds
    ) -> tuple[list[Score], dict[tuple[Token, ...], np.ndarray]]:
        """Return the scores of the candidates, and the out-of-fold distances [N] to the classes."""
        discriminants = [each for each in candidates if each.head == "lda"]
        scores: list[Score] = []
        distances: dict[tuple[Token, ...], np.ndarray] = {}
        if discriminants:
            logits, distances = self.predict_discriminants(discriminants, folds)
            scores = [self.score(each, None, logits[each]) for each in discriminants]

        for candidate in candidates:
            if candidate.head == "logistic":
                scores += self.compare_strengths(candidate, folds, scores)
        return scores, distances

    def predict_discriminants(
        self, candidates: Sequence[Candidate], folds: Folds
    ) -> tuple[dict[Candidate, np.ndarray], dict[tuple[Token, ...], np.ndarray]]:
        """Return out-of-fold logits of LDA candidates, which share the statistics of each token.

        Also return the distances for the tokens whose statistics the model of each would store.
        """
        logits = {each: self.build_logits() for each in candidates}
        distances = {
            choose_statistics_tokens(self.features, each): np.full(len(self.labels), np.nan)
            for each in [*candidates, Candidate("logistic", (-1,), candidates[0].pooling)]
            if choose_statistics_tokens(self.features, each)
        }
        for train, test in folds:
            known = self.find_known(train, test)
            left_out = {token: values[known] for token, values in self.features.items()}
            statistics = self.fit_statistics(train, tuple(self.features))
            token_logits = {}
            for token in self.features:
                weight, bias = statistics.select([token]).build_classifier(self.is_balanced)
                token_logits[token] = left_out[token] @ weight.T + bias
            for candidate in candidates:
                logits[candidate][known] = np.mean(
                    [token_logits[token] for token in candidate.tokens], axis=0
                )
            for tokens, values in distances.items():
                values[known] = statistics.select(tokens).compute_distances(left_out)
        return logits, distances

    def fit_statistics(self, train: np.ndarray, tokens: Sequence[Token]) -> ClassStatistics:
        return ClassStatistics.fit(
            {token: self.features[token][train] for token in tokens},
            self.labels[train],
            self.num_labels,
        )

    def compare_strengths(
        self, candidate: Candidate, folds: Folds, others: Sequence[Score]
    ) -> list[Score]:
        """Return the scores of a regression with its best strength and the neighbors of this one.

        The first fold tries all strengths. Beyond `FEW_IMAGES`, a regression that is clearly worse
        than another candidate in the first fold is not continued.
        """
        # The scale and the rotation see no labels, so that one of each serves all folds.
        values = stack_tokens(self.features, candidate.tokens)
        values = Transform.fit(values).apply(values)
        logits = {strength: self.build_logits() for strength in STRENGTHS}
        strengths: Sequence[float] = STRENGTHS
        for fold, (train, test) in enumerate(folds):
            known = self.find_known(train, test)
            for strength, weight, bias in self.fit_regressions(values, train, strengths):
                logits[strength][known] = values[known] @ weight.T + bias
            if fold:
                continue

            losses = [np.mean(self.compute_losses(logits[each])[known]) for each in STRENGTHS]
            best = int(np.argmin(losses))
            strengths = STRENGTHS[max(best - 1, 0) : best + 2]
            own = self.compute_losses(logits[STRENGTHS[best]])[known]
            if len(self.labels) > FEW_IMAGES and any(
                is_clearly_worse(own, other.losses[known], STOP_MARGIN) for other in others
            ):
                return []
        return [self.score(candidate, each, logits[each]) for each in strengths]

    def fit_regressions(
        self, values: np.ndarray, train: np.ndarray, strengths: Sequence[float]
    ) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
        """Yield each strength with weight [K, F] and bias [K], the most regularized one first."""
        from sklearn.linear_model import LogisticRegression

        regression = LogisticRegression(
            max_iter=MAX_ITERATIONS,
            warm_start=True,
            class_weight="balanced" if self.is_balanced else None,
        )
        for strength in strengths:
            regression.set_params(C=strength).fit(values[train], self.labels[train])
            coefficients, intercepts = regression.coef_, regression.intercept_
            if len(regression.classes_) == 2:  # sigmoid of z is the softmax of [-z / 2, z / 2]
                coefficients = np.concatenate([-coefficients, coefficients]) / 2
                intercepts = np.concatenate([-intercepts, intercepts]) / 2
            weight = np.zeros((self.num_labels, values.shape[1]))
            bias = np.full(self.num_labels, -np.inf)
            weight[regression.classes_] = coefficients
            bias[regression.classes_] = intercepts
            yield strength, weight, bias

    def fit(
        self, candidate: Candidate, strength: float | None, train: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return weight [K, F] and bias [K] of a candidate, fitted to some of the images."""
        if candidate.head == "lda":
            return self.fit_statistics(train, candidate.tokens).build_classifier(self.is_balanced)
        assert strength is not None
        values = stack_tokens(self.features, candidate.tokens)
        transform = Transform.fit(values)
        regressions = self.fit_regressions(transform.apply(values), train, [strength])
        _, weight, bias = next(regressions)
        return transform.fold(weight, bias)

    def extrapolate_temperature(self, chosen: Score, folds: Folds) -> float:
        """Return the temperature of a classifier of all images.

        That of ten folds, with nine tenths of the images, is between it and that of five folds.
        """
        if len(folds) < NUM_FOLDS_OF_FEW:
            return chosen.temperature
        logits = self.build_logits()
        for train, test in split_folds(self.labels, self.groups, NUM_FOLDS):
            known = self.find_known(train, test)
            weight, bias = self.fit(chosen.candidate, chosen.strength, train)
            values = stack_tokens(self.features, chosen.candidate.tokens)[known]
            logits[known] = values @ weight.T + bias
        other = self.score(chosen.candidate, chosen.strength, logits)
        ratio = chosen.temperature / other.temperature
        return chosen.temperature * min(max(ratio, 0.5), 1.0)

    def score(self, candidate: Candidate, strength: float | None, logits: np.ndarray) -> Score:
        """Return the score of out-of-fold logits [N, K], with their best temperature."""
        known = ~np.isnan(logits).any(axis=1)
        temperature = fit_temperature(logits[known], self.labels[known], self.weights[known])
        losses = self.compute_losses(logits / temperature)
        is_right = np.where(known, logits.argmax(axis=1) == self.labels, np.nan)
        return Score(candidate, strength, logits, temperature, losses, is_right)

    def compute_losses(self, logits: np.ndarray) -> np.ndarray:
        """Return the log loss [N] of each image, NaN where it was not predicted."""
        return -log_softmax(logits, axis=1)[np.arange(len(self.labels)), self.labels]

    def build_logits(self) -> np.ndarray:
        return np.full((len(self.labels), self.num_labels), np.nan)

    def find_known(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """Return the left-out images whose class has training images."""
        return test[np.isin(self.labels[test], self.labels[train])]


def is_clearly_worse(losses: np.ndarray, other_losses: np.ndarray, num_errors: float) -> bool:
    """Return whether the mean of losses is some standard errors above that of others.

    The losses are of the same images, so that the error is that of their differences.
    """
    differences = losses - other_losses
    differences = differences[np.isfinite(differences)]
    return differences.mean() > num_errors * differences.std() / np.sqrt(len(differences))


@dataclass(frozen=True)
class Transform:
    """Centers, scales and rotates features [N, F] to [N, min(N, F)].

    L2 regularization does not depend on the basis, so that the rotation changes no result. It makes
    fits to few images fast.
    """

    mean: np.ndarray  # [F]
    scale: float
    rotation: np.ndarray | None  # [F, R]; None with more images than features

    @classmethod
    def fit(cls, features: np.ndarray) -> "Transform":
        """Fit the transform to features [N, F]; afterwards, their mean squared norm is 1."""
        mean = features.mean(axis=0)
        centered = features - mean
        scale = float(np.sqrt((centered**2).sum(axis=1).mean())) or 1.0
        rotation = None
        if len(features) < features.shape[1]:
            scaled = centered / scale
            # faster than an SVD of the features
            values, vectors = np.linalg.eigh(scaled @ scaled.T)
            is_used = values > RANK_TOLERANCE * values.max(initial=0.0)
            rotation = scaled.T @ (vectors[:, is_used] / np.sqrt(values[is_used]))
        return cls(mean, scale, rotation)

    def apply(self, features: np.ndarray) -> np.ndarray:
        scaled = (features - self.mean) / self.scale
        return scaled if self.rotation is None else scaled @ self.rotation

    def fold(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return weight [K, F] and bias [K] with the same logits for features as they are."""
        if self.rotation is not None:
            weight = weight @ self.rotation.T
        weight = weight / self.scale
        return weight, bias - weight @ self.mean
