"""Temperature, as in torch, and the line of each of several labels, as in scikit-learn."""

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from pytest import approx
from scipy.special import expit, softmax
from sklearn.calibration import _SigmoidCalibration
from torch import nn

from modeling_vitcls.frozen.confidence import fit_line, fit_temperature


NUM_LABELS = 6


def draw_outputs(num_images: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N, L] and labels [N] that are drawn from softmax(logits / temperature)."""
    generator = default_rng(0)
    logits = 2 * generator.normal(size=(num_images, NUM_LABELS))
    labels = np.array(
        [generator.choice(NUM_LABELS, p=row) for row in softmax(logits / temperature, axis=1)]
    )
    return logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_the_temperature_minimizes_the_cross_entropy(temperature: float) -> None:
    logits, labels = draw_outputs(4000, temperature)
    fitted = fit_temperature(logits, labels)
    assert fitted == approx(temperature, rel=0.05)
    divided = [torch.from_numpy(logits / (factor * fitted)) for factor in (0.999, 1, 1.001)]
    smoothing = 0.5 / 4001 * NUM_LABELS / (NUM_LABELS - 1)  # torch's is uniform over all labels
    losses = [
        nn.functional.cross_entropy(
            each, torch.from_numpy(labels), label_smoothing=smoothing
        ).item()
        for each in divided
    ]
    assert min(losses) == losses[1]


@pytest.mark.parametrize("num_images", [2, 14, 200])
def test_images_that_are_all_right_leave_a_doubt_about_the_next_one(num_images: int) -> None:
    labels = np.arange(num_images) % 2
    logits = 30 * np.eye(2)[labels]
    probabilities = softmax(logits / fit_temperature(logits, labels), axis=1)
    assert probabilities.max() == approx((num_images + 0.5) / (num_images + 1), rel=1e-4)


@pytest.mark.parametrize("scale", [-30, -1e-12])
def test_images_that_are_all_wrong_are_wrong_in_single_precision_too(scale: float) -> None:
    labels = np.arange(14) % 2
    logits = scale * np.eye(2)[labels]
    probabilities = softmax(logits / fit_temperature(logits, labels), axis=1)
    logarithms = np.log(probabilities).astype(np.float32)
    assert np.array_equal(logarithms.argmax(axis=1), 1 - labels)


@pytest.mark.parametrize("scale", [0.01, 300.0])
@pytest.mark.parametrize("num_images", [12, 400])
def test_a_line_is_that_of_platt_scaling(num_images: int, scale: float) -> None:
    generator = default_rng(0)
    scores = generator.normal(size=num_images)
    labels = generator.random(num_images) < expit(3 * scores - 1)
    slope, offset = fit_line(scale * scores, labels)

    expected = _SigmoidCalibration().fit(scores, labels)
    assert slope * scale == approx(-expected.a_, rel=1e-3)
    assert offset == approx(-expected.b_, abs=1e-3)


def test_scores_that_are_lower_with_the_label_say_nothing() -> None:
    scores = np.linspace(1, -1, 20)
    slope, offset = fit_line(scores, np.arange(20) >= 10)
    assert slope == 0
    assert offset == approx(0, abs=1e-6)
