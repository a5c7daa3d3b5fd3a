"""Temperature, energy threshold and prediction sets, as in scikit-learn, torch and MAPIE."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from modeling_vitcls.inference.confidence import (
    build_prediction_sets,
    compute_energies,
    find_energy_threshold,
    find_score_limit,
    fit_temperature,
    measure_prediction_sets,
    measure_unknown,
)


NUM_LABELS = 6


def draw_outputs(
    num_images: int, temperature: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N, L] and labels [N] that are drawn from softmax(logits / temperature)."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(num_images, NUM_LABELS))
    labels = np.array(
        [generator.choice(NUM_LABELS, p=row) for row in softmax(logits / temperature, axis=1)]
    )
    return logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_the_temperature_minimizes_the_cross_entropy(temperature: float) -> None:
    logits, labels = draw_outputs(4000, temperature)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(temperature, rel=0.05)
    divided = [torch.from_numpy(logits / (factor * fitted)) for factor in (0.999, 1, 1.001)]
    losses = [
        torch.nn.functional.cross_entropy(each, torch.from_numpy(labels)).item() for each in divided
    ]
    assert min(losses) == losses[1]
    # the limits
    assert fit_temperature(logits, logits.argmax(axis=1)) == pytest.approx(0.05, rel=1e-3)
    assert fit_temperature(logits, logits.argmin(axis=1)) == pytest.approx(20, rel=1e-3)


def test_energy_separates_images_of_other_classes() -> None:
    logits, _ = draw_outputs(1000, 1.0)
    assert compute_energies(logits) == pytest.approx(
        -torch.logsumexp(torch.from_numpy(logits), 1).numpy()
    )
    threshold = find_energy_threshold(logits)
    assert threshold == np.sort(compute_energies(logits))[950]


def test_prediction_sets_equal_mapie() -> None:
    classification = pytest.importorskip(
        "mapie.classification", reason="mapie is in the test extra"
    )
    images, labels = draw_outputs(1000, 1.0)
    classifier = LogisticRegression().fit(images[:200], labels[:200])
    probabilities = classifier.predict_proba(images)
    conformal = classification.SplitConformalClassifier(
        classifier, confidence_level=0.9, conformity_score="lac", prefit=True
    )
    conformal.conformalize(images[200:600], labels[200:600])
    expected = conformal.predict_set(images[600:])[1][:, :, 0]
    limit = find_score_limit(probabilities[200:600], labels[200:600], 0.9)

    assert (build_prediction_sets(probabilities[600:], limit) == expected).all()


def test_coverage_requires_enough_images() -> None:
    limit = find_score_limit(np.full((9, 2), 0.5), np.zeros(9, int), 0.9)
    assert limit == 0.5
    assert build_prediction_sets(np.full((1, 2), 0.5), limit).all()
    with pytest.raises(ValueError, match=r"`coverage=0.9`.* 9\b.*\b8\b"):
        find_score_limit(np.full((8, 2), 0.5), np.zeros(8, int), 0.9)


def test_sets_and_unknown_images_are_measured_on_images_that_set_no_limit() -> None:
    """The limit is fitted to every second image, and measured on the others.

    For a coverage of 0.5, it is the second of the scores 0.1, 0.3, 0.4. The sets of the others have
    1 (wrong), 1 and 0 labels.
    """
    labels = np.array([0, 0, 0, 1, 0, 1])
    probabilities = np.zeros((6, 3))
    probabilities[np.arange(6), labels] = [0.9, 0.2, 0.7, 0.95, 0.6, 0.65]
    probabilities[np.arange(6), 1 - labels] = [0.1, 0.8, 0.3, 0.05, 0.4, 0.35]
    rows = [
        list(row.values())
        for row in measure_prediction_sets(probabilities, labels, ["a", "b", "c"], 0.5)
    ]

    assert [row[:2] for row in rows] == [["all classes", 3], ["a", 1], ["b", 2]]
    assert [row[2:] for row in rows] == [
        pytest.approx(each) for each in ([2 / 3, 1 / 3], [1, 0], [0.5, 0.5])
    ]
    assert measure_prediction_sets(probabilities, labels, ["a", "b", "c"], 0.9) == []

    known, unknown = (
        np.array([[value, -99.0] for value in values]) for values in ([5.0, 4.0, 1.0], [2.0, 0.0])
    )
    measured = {"num_images": 2, "auroc": pytest.approx(5 / 6), "flagged": 0.5}
    # an energy at the threshold is not flagged
    assert measure_unknown(known, unknown, threshold=-2.0) == measured
    assert measure_unknown(known, unknown, threshold=None) == measured | {"flagged": None}
