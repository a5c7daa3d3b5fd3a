"""Choice and fit of a linear classifier on features.

It is equal to scikit-learn's, and chosen on images that it has not seen.
"""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.preprocessing import StandardScaler

from modeling_vitcls.inference.linear_probe import (
    Candidate,
    CrossValidation,
    choose_probe,
    fit_classifier,
    list_candidates,
    split_folds,
)


LAST_CLS = Candidate((-1,), "cls", "raw")
EARLIER = Candidate((-3,), "cls", "raw")


def build_features(
    num_images: int, num_features: int, num_classes: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Return features with a mean and different scales, and labels that depend on them."""
    generator = np.random.default_rng(0)
    labels = np.arange(num_images) % num_classes
    centers = generator.normal(size=(num_classes, num_features))
    noise = generator.normal(size=(num_images, num_features))
    return 3 + (centers[labels] + 2 * noise) * generator.uniform(0.1, 10, num_features), labels


@pytest.mark.parametrize(
    "num_features", [6, 90], ids=["fewer features than images", "more features than images"]
)
@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_classifier_is_the_regression_of_scikit_learn(
    num_features: int, num_classes: int
) -> None:
    """The strength is for features with a mean squared norm of 1, so C / F if standardized."""
    features, labels = build_features(60, num_features, num_classes)
    classifier = fit_classifier(features, labels, num_classes, "standardized", strength=16.0)
    scaler = StandardScaler().fit(features)
    regression = LogisticRegression(C=16.0 / num_features, max_iter=1000, tol=1e-6)
    expected = regression.fit(scaler.transform(features), labels).predict_proba(
        scaler.transform(features)
    )
    logits = features @ classifier.weight.T + classifier.bias
    np.testing.assert_allclose(softmax(logits, axis=1), expected, atol=2e-3)


def test_a_class_without_images_is_never_predicted() -> None:
    features, labels = build_features(60, 6)
    classifier = fit_classifier(features, labels * 2, 6, "raw", strength=16.0)
    probabilities = softmax(features @ classifier.weight.T + classifier.bias, axis=1)
    assert probabilities[:, [1, 3, 5]].max() < 1e-30


def test_images_are_predicted_by_regressions_that_were_not_fitted_to_them() -> None:
    features, labels = build_features(60, 6)
    folds = split_folds(labels)
    run = CrossValidation(LAST_CLS, features, labels, 3)
    for train, test in folds:
        run.run_fold(train, test)
    score = run.get_score()
    regression = LogisticRegression(C=score.strength, max_iter=1000, tol=1e-6)
    expected = cross_val_predict(regression, run.features, labels, cv=folds, method="predict_proba")
    np.testing.assert_allclose(softmax(score.logits, axis=1), expected, atol=2e-3)


def choose(features: dict[Candidate, np.ndarray], labels: np.ndarray) -> Candidate:
    candidates = sorted(features, key=lambda candidate: candidate.complexity)
    return choose_probe(features.__getitem__, labels, 3, candidates).candidate


def test_the_default_wins_among_equals() -> None:
    features, labels = build_features(90, 8)
    noise = np.random.default_rng(1).normal(size=features.shape) * 1e-3
    assert choose({LAST_CLS: features, EARLIER: features + noise}, labels) == LAST_CLS


def test_a_layer_with_better_features_wins() -> None:
    features, labels = build_features(90, 8)
    noise = np.random.default_rng(1).normal(size=features.shape) * features.std(axis=0)
    assert choose({LAST_CLS: features + 3 * noise, EARLIER: features}, labels) == EARLIER


def test_the_only_image_of_a_class_is_always_used_for_training() -> None:
    labels = np.array([0] * 10 + [1] * 10 + [2])
    folds = split_folds(labels)
    assert all(20 in train and 20 not in test for train, test in folds)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(20))


def test_too_few_images_give_the_default() -> None:
    features = np.eye(3)
    choice = choose_probe(lambda candidate: features, np.arange(3), 3, list_candidates(4))
    assert choice.candidate == LAST_CLS
    assert choice.score is None


def test_given_layers_and_tokens_are_not_searched() -> None:
    candidates = list_candidates(12, layers=[-2, -1], tokens=["mean"])
    assert {(candidate.layers, candidate.tokens) for candidate in candidates} == {
        ((-2, -1), "mean")
    }


def test_a_class_with_one_image_does_not_hide_the_better_layer() -> None:
    """Its only image is never predicted, so that it has no loss."""
    features, labels = build_features(91, 8)
    labels[-1] = 3
    noise = np.random.default_rng(1).normal(size=features.shape) * features.std(axis=0)
    candidates = {LAST_CLS: features + 3 * noise, EARLIER: features}
    ordered = sorted(candidates, key=lambda candidate: candidate.complexity)
    assert choose_probe(candidates.__getitem__, labels, 4, ordered).candidate == EARLIER
