"""Class statistics, compared with scikit-learn's linear discriminant analysis and scipy."""

import numpy as np
import pytest
from helpers.tiny_models import CLS, MEAN
from numpy.random import default_rng
from numpy.testing import assert_allclose
from pytest import approx
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from modeling_vitcls.frozen.class_statistics import ClassStatistics, build_label_scores


def draw_features(num_images: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """Return features [N, 24] of three classes of different sizes, and labels [N]."""
    generator = default_rng(0)
    labels = np.sort(generator.choice(3, num_images, p=(0.5, 0.3, 0.2)))
    centers = default_rng(7).normal(size=(3, 24))
    scales = np.linspace(0.5, 3, 24)
    return centers[labels] + generator.normal(size=(num_images, 24)) * scales, labels


@pytest.mark.parametrize("num_images", [30, 300])
def test_the_classifier_is_scikit_learns_discriminant_analysis(num_images: int) -> None:
    features, labels = draw_features(num_images)
    statistics = ClassStatistics.fit({CLS: features}, labels, 3)
    weight, bias = statistics.build_classifier()
    bias = bias - statistics.sizes[0] / (2 * statistics.counts)  # the noise of the means

    expected = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features, labels)
    coefficients = expected.coef_ - expected.coef_.mean(axis=0)
    assert_allclose(weight, coefficients, atol=1e-8)
    differences = expected.intercept_ - expected.intercept_[0]
    assert_allclose(bias - bias[0], differences, atol=1e-8)


def test_the_classifier_of_two_tokens_averages_their_logits() -> None:
    features, labels = draw_features()
    tokens = {CLS: features, MEAN: features**2}
    logits = []
    for token in tokens:
        weight, bias = ClassStatistics.fit({token: tokens[token]}, labels, 3).build_classifier()
        logits.append(tokens[token] @ weight.T + bias)

    weight, bias = ClassStatistics.fit(tokens, labels, 3).build_classifier()
    combined = np.concatenate(list(tokens.values()), axis=1) @ weight.T + bias
    expected = np.mean(logits, axis=0)
    assert_allclose(combined - combined[:, :1], expected - expected[:, :1])


def test_a_distance_is_scipys_to_the_nearest_class_mean() -> None:
    features, labels = draw_features()
    statistics = ClassStatistics.fit({CLS: features}, labels, 3)

    distances = statistics.compute_distances({CLS: features[:2]})
    precision = statistics.precisions[0]
    noise = statistics.sizes[0] / statistics.counts
    expected = [
        min(
            mahalanobis(row, mean, precision) ** 2 - noise[label]
            for label, mean in enumerate(statistics.means[0])
        )
        for row in features[:2]
    ]
    assert_allclose(distances, np.sqrt(expected))


def test_left_out_images_are_measured_from_the_mean_of_the_others() -> None:
    features, labels = draw_features()
    statistics = ClassStatistics.fit({CLS: features}, labels, 3)
    groups = np.arange(90) // 2 * 100 + labels  # Most images have a copy
    found = statistics.measure_left_out({CLS: features}, labels, groups)
    for index in (0, 47, 89):
        others = features[(labels == labels[index]) & (groups != groups[index])]
        square = mahalanobis(features[index], others.mean(axis=0), statistics.precisions[0]) ** 2
        expected = np.sqrt(max(square - statistics.sizes[0] / len(others), 0))
        assert found[index] == approx(expected)
    single = statistics.measure_left_out({CLS: features[:1]}, labels[:1], groups[:1])
    assert np.isnan(single).all()


def test_an_added_class_of_many_images_has_the_row_of_a_fitted_one() -> None:
    features, labels = draw_features(3000)
    statistics = ClassStatistics.fit({CLS: features[labels < 2]}, labels[labels < 2], 2)
    is_new = labels == 2
    new = features[is_new]
    numbers = np.arange(len(new))
    extended = statistics.extend({CLS: new}, 0 * numbers, 1, groups=numbers, threshold=None)
    rows, _ = extended.build_new_rows(2)

    weight, _ = ClassStatistics.fit({CLS: features}, labels, 3).build_classifier()
    assert np.corrcoef(rows[0], weight[2])[0, 1] > 0.99


def test_a_class_of_five_images_is_found_as_often_as_one_of_many() -> None:
    features, labels = draw_features(4000)
    is_new = labels == 2
    statistics = ClassStatistics.fit({CLS: features[~is_new]}, labels[~is_new], 2)
    weight, bias = statistics.build_classifier(has_equal_priors=True)

    def measure_recall(images: np.ndarray) -> float:
        numbers = np.arange(len(images))
        added = statistics.extend({CLS: images}, 0 * numbers, 1, groups=numbers, threshold=None)
        rows, biases = added.build_new_rows(2)
        logits = features[is_new][500:] @ np.vstack([weight, rows]).T + [*bias, *biases]
        return float((logits.argmax(axis=1) == 2).mean())

    few = [measure_recall(features[is_new][start : start + 5]) for start in range(0, 500, 5)]
    assert np.mean(few) == approx(measure_recall(features[is_new][:500]), abs=0.1)


def test_a_class_without_images_is_never_predicted() -> None:
    features, labels = draw_features()
    weight, bias = ClassStatistics.fit({CLS: features}, labels * 2, 6).build_classifier()
    assert set((features @ weight.T + bias).argmax(axis=1)) == {0, 2, 4}


def test_classes_of_identical_images_are_told_apart() -> None:
    """As in a toy dataset of solid colors: nothing varies within a class."""
    features = {CLS: np.repeat(np.eye(3, 5), 4, axis=0)}
    statistics = ClassStatistics.fit(features, np.repeat(range(3), 4), 3)
    weight, bias = statistics.build_classifier()
    assert (np.eye(3, 5) @ weight.T + bias).argmax(axis=1).tolist() == [0, 1, 2]
    assert np.allclose(statistics.compute_distances(features), 0, atol=1e-3)


def test_rounding_errors_of_a_constant_feature_decide_nothing() -> None:
    generator = default_rng(0)
    labels = np.arange(60) % 3
    values = generator.normal(size=(60, 8)) + 3 * np.eye(3, 8)[labels]
    values[:, 7] = 1 + 1e-7 * generator.normal(size=60)
    statistics = ClassStatistics.fit({CLS: values}, labels, 3)
    shifted = values + 1e-5 * np.eye(8)[7]
    before, after = (statistics.compute_distances({CLS: each}) for each in (values, shifted))
    assert np.allclose(before, after, rtol=1e-2)


def test_several_labels_share_one_covariance_of_all_images() -> None:
    generator = default_rng(0)
    labels = generator.random((60, 3)) < 0.3
    labels[:, 2] = True
    values = labels @ generator.normal(size=(3, 80)) + generator.normal(size=(60, 80)) * 3
    weight, bias = build_label_scores(values, labels)
    scales = values.std(axis=0)
    covariance = LedoitWolf().fit(values / scales).covariance_ * np.outer(scales, scales)
    expected = np.zeros((60, 2))
    for label in range(2):
        has_label = labels[:, label]
        direction = np.linalg.inv(covariance) @ (
            values[has_label].mean(axis=0) - values[~has_label].mean(axis=0)
        )
        expected[:, label] = (values - values.mean(axis=0)) @ direction
    scores = values @ weight.T + bias
    assert_allclose(scores[:, :2], expected, atol=1e-8)
    assert not weight[2].any()  # all images have it
