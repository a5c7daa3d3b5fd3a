"""Confidence intervals, compared with published formulas and tables."""

import numpy as np
import pytest
from numpy.random import default_rng
from pytest import approx
from sklearn.metrics import average_precision_score

from modeling_vitcls.inference.intervals import (
    compute_bootstrap_interval,
    estimate_after_choice,
    estimate_average_precision,
)


def test_bootstrap_intervals_approach_the_normal_approximation() -> None:
    values = default_rng(0).normal(3, 2, 400)
    low, high = compute_bootstrap_interval(values)
    standard_error = values.std() / 20
    assert low == approx(values.mean() - 1.96 * standard_error, abs=0.3 * standard_error)
    assert high == approx(values.mean() + 1.96 * standard_error, abs=0.3 * standard_error)
    assert low < values.mean() < high
    assert compute_bootstrap_interval(values) == (low, high)
    assert compute_bootstrap_interval([2.0]) == (2.0, 2.0)
    # quantiles of a binomial variable
    assert compute_bootstrap_interval([0.0] * 9 + [1.0]) == approx((0, 0.3))


def test_the_interval_of_images_that_are_all_right_is_not_empty() -> None:
    """Wilson's interval of 14 of 14 begins at 78.5%."""
    is_right = np.ones((3, 14))
    accuracy, (low, high) = estimate_after_choice(1 - is_right, is_right, np.arange(14)).values()
    assert accuracy == 1
    assert low == approx(0.785, abs=1e-3)
    assert high == approx(1)


def test_mean_average_precision_is_scikit_learns_and_its_interval_that_of_new_images() -> None:
    generator = default_rng(0)

    def draw(num_images: int) -> tuple[np.ndarray, np.ndarray]:
        labels = generator.random((num_images, 4)) < [0.5, 0.2, 0.1, 0.0]
        # rounded: some images have equal scores
        return np.round(labels + generator.normal(size=labels.shape), 1), labels

    scores, labels = draw(300)
    precision, interval = estimate_average_precision(scores, labels, np.arange(300)).values()
    with_images = [
        average_precision_score(labels[:, label], scores[:, label]) for label in range(3)
    ]
    assert precision == approx(np.mean(with_images))
    expected = average_precision_score(*(each[:, :3] for each in draw(20_000)[::-1]))
    assert interval[0] < expected < interval[1]
    copies = [np.repeat(each, 4, axis=0) for each in (scores, labels)]
    _, of_groups = estimate_average_precision(*copies, groups=np.arange(1200) // 4).values()
    assert of_groups == approx(interval, abs=0.02)


def test_a_label_that_a_sample_lacks_has_there_what_it_has_on_all_images() -> None:
    scores = np.arange(80)[:, None].repeat(2, axis=1)
    labels = (scores == 78) | [True, False]  # the second of 80 images, in 63% of the samples
    _, (low, high) = estimate_average_precision(scores, labels, np.arange(80)).values()
    assert 0.5 <= low < high < 0.95
    mean, _ = estimate_average_precision(scores[:, 1:], labels[:, 1:], np.arange(80)).values()
    assert mean == 0.5


@pytest.mark.parametrize(("num_images", "is_perfect"), [(20, False), (80, True)])
def test_few_or_perfect_predictions_have_no_interval_of_the_average_precision(
    num_images: int, is_perfect: bool
) -> None:
    generator = default_rng(0)
    labels = generator.random((num_images, 3)) < 0.5
    scores = labels + (0 if is_perfect else generator.normal(0, 1, labels.shape))
    found = estimate_average_precision(scores, labels, np.arange(num_images))
    assert found.keys() == {"mean_average_precision"}
