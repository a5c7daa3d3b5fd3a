"""Choice and result of a linear classifier of frozen features."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny_models import CLS, MEAN, raises_one_line
from numpy.random import default_rng
from pytest import CaptureFixture, MonkeyPatch, approx
from scipy.spatial.distance import cdist
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling_vitcls.frozen.linear_probe import LinearProbe, split_folds
from modeling_vitcls.runtime import progress


def draw_images(
    num_images: int, seed: int = 0, num_classes: int = 4
) -> tuple[dict[tuple[int, str], np.ndarray], np.ndarray]:
    """Return CLS tokens with the class and means without it, and labels."""
    labels = np.arange(num_images) % num_classes
    return draw_tokens_of(np.eye(num_classes)[labels], default_rng(seed)), labels


def draw_tokens_of(
    labels: np.ndarray, generator: np.random.Generator
) -> dict[tuple[int, str], np.ndarray]:
    """Return CLS tokens with labels [N, C] of 0 and 1, and means without them."""
    num_images, num_classes = labels.shape
    centers = default_rng(1).normal(size=(num_classes, 16))
    return {
        CLS: labels @ centers + generator.normal(size=(num_images, 16)),
        MEAN: generator.normal(size=(num_images, 16)),
    }


def test_tokens_without_the_class_are_not_chosen() -> None:
    assert LinearProbe().fit(*draw_images(120)).candidate_.pooling != "mean"


def test_it_is_an_estimator_of_scikit_learn() -> None:
    features, labels = draw_images(120)
    pipeline = make_pipeline(StandardScaler(), LinearProbe())
    assert cross_val_score(pipeline, features[CLS], labels).min() > 0.8


@pytest.mark.parametrize("convert", [list, pd.DataFrame, torch.tensor])
def test_features_and_labels_may_be_what_scikit_learn_takes(convert: Any) -> None:
    features, labels = draw_images(40)
    expected = LinearProbe().fit(features[CLS], labels > 0).predict_proba(features[CLS])
    probe = LinearProbe().fit(convert(features[CLS]), convert(labels[:, None] > 0))
    assert np.array_equal(probe.predict_proba(convert(features[CLS])), expected)


def test_columns_that_fit_has_not_seen_are_refused() -> None:
    table = pd.DataFrame({"a": [1, 2], "b": [3, 4]})
    with pytest.raises(ValueError, match="same order"):
        LinearProbe().fit(table, [0, 1]).predict(table[["b", "a"]])
    with raises_one_line("1 feature", "2 features"):
        LinearProbe().fit(table.values, [0, 1]).predict([[1]])


@pytest.mark.parametrize(
    "setting",
    [
        {"pooling": "balance"},
        {"class_weight": "balance"},
        {"inference": "balance"},
        {"layers": [-2]},
    ],
)
def test_settings_that_do_not_fit_the_features_are_refused(setting: dict[str, Any]) -> None:
    with raises_one_line(*setting):
        LinearProbe(**setting).fit(*draw_images(40))


def test_images_without_a_group_are_one_group() -> None:
    groups = [*"aaaabbbb", *[None] * 4]
    assert LinearProbe().fit(*draw_images(12), groups).num_folds_ == 3


def test_features_of_an_unreadable_image_and_wrong_labels_are_refused() -> None:
    features, labels = draw_images(40)
    probe = LinearProbe()
    with pytest.raises(NotFittedError):
        probe.predict(features)
    probe.fit(features, labels)
    with raises_one_line("continuous"):
        probe.fit(features, labels + 0.5)
    with raises_one_line("[N]"):
        probe.fit(features, np.stack([labels, labels], axis=1))
    with raises_one_line("missing"):
        probe.fit(features, [*labels[1:], None])
    with raises_one_line("inconsistent numbers of samples"):
        probe.fit(features, labels[:30])
    with raises_one_line("two readable images", "Add images"):
        probe.fit({CLS: features[CLS][:1]}, labels[:1])
    features[CLS][7] = np.nan
    with raises_one_line("1 of 40 images"):
        probe.predict(features)
    with raises_one_line("not finite", "Leave out"):
        probe.fit(features, labels)


def test_a_long_cross_validation_shows_its_folds(
    monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    LinearProbe().fit(*draw_images(40))
    assert "cross-validation 1 of 10 folds" in capsys.readouterr().out


def test_the_estimate_is_that_of_new_images() -> None:
    differences = []
    for seed in range(4):
        probe = LinearProbe().fit(*draw_images(120, seed))
        features, labels = draw_images(2000, 100 + seed)
        assert probe.estimate_ is not None
        accuracy = probe.score(features, labels)
        low, high = probe.estimate_["accuracy_interval"]
        assert low <= accuracy <= high
        differences.append(probe.estimate_["accuracy"] - accuracy)
    assert abs(np.mean(differences)) < 0.05


def test_images_of_a_group_are_predicted_without_their_copies() -> None:
    copies = np.tile(default_rng(3).normal(size=(40, 16)), (2, 1))
    groups = np.arange(80) % 40
    probe = LinearProbe().fit(copies, groups % 2, groups)
    assert probe.estimate_ is not None
    assert probe.estimate_["accuracy"] < 0.8


def test_folds_of_three_groups_know_all_classes_although_one_group_has_both() -> None:
    groups = np.arange(60) % 3
    labels = np.where(groups == 2, np.arange(60) % 2, groups)
    folds = split_folds(labels, groups)
    assert len(folds) == 3
    for train, test in folds:
        assert set(labels[train]) == {0, 1}
        assert not set(groups[train]) & set(groups[test])


def test_labels_may_be_names_and_a_class_may_have_one_image() -> None:
    features, labels = draw_images(60, num_classes=2)
    names = np.array(["ant", "bee"])[labels]
    names[0] = "cat"
    probe = LinearProbe().fit(features, names)
    assert probe.classes_.tolist() == ["ant", "bee", "cat"]
    assert np.isnan(probe.out_of_fold_[0]).all()
    assert np.isfinite(probe.out_of_fold_[1:]).all()
    assert set(probe.predict(features)) <= {"ant", "bee", "cat"}


def test_classes_that_the_choice_lacked_are_added_to_its_probabilities() -> None:
    """Of very many classes, the images of the choice may lack some."""
    features, labels = draw_images(60, num_classes=4)
    names = np.array(["ant", "bee", "cat", "dog"])[labels]
    some = names != "bee"
    probe = LinearProbe().fit({CLS: features[CLS][some]}, names[some])
    before = probe.out_of_fold_
    probe.refit(features, names)
    assert probe.classes_.tolist() == ["ant", "bee", "cat", "dog"]
    assert np.array_equal(probe.out_of_fold_[:, [0, 2, 3]], before)
    assert not probe.out_of_fold_[:, 1].any()


@pytest.mark.parametrize("num_images", [10, 60])
def test_features_of_noise_have_as_many_right_predictions_in_single_precision(
    num_images: int,
) -> None:
    labels = np.arange(num_images) % 2
    counts = []
    for seed in range(8):
        features = default_rng(seed).normal(size=(num_images, 16)).astype(np.float32)
        probabilities = LinearProbe().fit(features, labels).out_of_fold_
        for values in (probabilities, np.log(probabilities).astype(np.float32)):
            counts.append((values.argmax(axis=1) == labels).sum())
    assert counts[::2] == counts[1::2]


def test_one_tag_has_no_temperature() -> None:
    features, labels = draw_tags(40, 0)
    probe = LinearProbe().fit(features, labels[:, :1])
    assert all("temperature" not in row for row in probe.table_)


def test_the_temperature_of_five_images_per_class_suits_the_classifier_of_all_of_them() -> None:
    def draw_tokens(num_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(num_images) % 4
        centers = default_rng(1).normal(size=(4, 64)) / 2
        return centers[labels] + default_rng(seed).normal(size=(num_images, 64)), labels

    gains = []
    for seed in range(4):
        probe = LinearProbe().fit(*draw_tokens(20, seed))
        tokens, labels = draw_tokens(1000, 100 + seed)
        losses = []
        for temperature in (probe.table_[0]["temperature"], probe.temperature_):
            probe.temperature_ = temperature
            losses.append(-np.log(probe.predict_proba(tokens)[np.arange(1000), labels]).mean())
        gains.append(losses[0] - losses[1])
    assert min(gains) > 0.02


def draw_tags(num_images: int, seed: int) -> tuple[dict[tuple[int, str], np.ndarray], np.ndarray]:
    """Return tokens and four labels of each image: two nested ones, a rare one, and one of an image."""
    generator = default_rng(seed)
    labels = generator.random((num_images, 4)) < [0.5, 0.5, 0.1, 0]
    labels[:, 1] &= labels[:, 0]
    labels[0, 3] = True
    return draw_tokens_of(labels, generator), labels.astype(np.float32)


def test_several_labels_have_calibrated_probabilities() -> None:
    probe = LinearProbe().fit(*draw_tags(120, 0))
    features, labels = draw_tags(2000, 1)
    probabilities = probe.predict_proba(features)
    assert probabilities[:, 3] == approx(2 / 122)  # the smoothed share of one image
    losses = [log_loss(labels[:, index], probabilities[:, index]) for index in range(3)]
    shares = [
        log_loss(labels[:, index], np.full(2000, labels[:, index].mean())) for index in range(3)
    ]
    assert np.all(np.array(losses) < 0.6 * np.array(shares))
    assert probe.candidate_.pooling != "mean"
    assert np.isfinite(probe.losses_).all()
    assert np.mean(probe.losses_) == approx(sum(losses) / 4, abs=0.04)
    assert "mean_average_precision" in probe.estimate_
    assert np.array_equal(probe.predict(features), probabilities > 0.5)


def test_tags_of_three_images_are_too_few_for_folds() -> None:
    features, labels = draw_tags(3, 0)
    probe = LinearProbe().fit(features, labels)
    shares = (labels.sum(axis=0) + 1) / 5
    assert np.allclose(probe.predict_proba(features), shares)


def measure_recalls(num_classes: int, counts: tuple[int, int], seed: int) -> np.ndarray:
    """Fit half of the classes to `counts[0]` images each and the others to `counts[1]`.

    As in the features of an encoder, few directions have most of the variance within the classes.

    Returns:
        [3, 2]: the recall of new images of both halves, by the probe and by the nearest class mean;
        and the accuracy of the probe, as estimated and as measured.
    """
    generator = default_rng(seed)
    scales = 4 / np.sqrt(np.arange(1, 49))
    centers = generator.normal(size=(num_classes, 48))
    halves = np.arange(num_classes) % 2

    def draw(labels: np.ndarray) -> np.ndarray:
        return centers[labels] + generator.normal(size=(len(labels), 48)) * scales

    labels = np.repeat(np.arange(num_classes), np.array(counts)[halves])
    new_labels = np.repeat(np.arange(num_classes), 400 // num_classes)
    images, new_images = draw(labels), draw(new_labels)
    probe = LinearProbe().fit(images, labels)
    means = np.stack([images[labels == label].mean(axis=0) for label in range(num_classes)])
    predicted = [probe.predict(new_images), cdist(new_images, means).argmin(axis=1)]
    is_right = np.stack(predicted) == new_labels
    recalls = [is_right[:, halves[new_labels] == half].mean(axis=1) for half in (0, 1)]
    estimated = np.nan if probe.estimate_ is None else probe.estimate_["accuracy"]
    return np.vstack([np.stack(recalls, axis=1), [estimated, is_right[0].mean()]])


@pytest.mark.parametrize("num_classes", [2, 20, 100])
@pytest.mark.parametrize(
    "counts", [(few, many) for many in (1, 2, 3, 5) for few in {1, min(2, many), many}]
)
def test_with_few_images_classes_are_found_as_often_as_by_the_nearest_mean(
    counts: tuple[int, int], num_classes: int
) -> None:
    num_draws = 20 // num_classes or 1
    draws = [measure_recalls(num_classes, counts, seed) for seed in range(num_draws)]
    own, nearest, (estimated, measured) = np.mean(draws, axis=0)
    assert own.mean() > nearest.mean() - 0.05
    assert own[1] > own[0] - 0.05
    assert not estimated > measured + 0.15  # NaN without folds


def test_pairs_set_no_distance_threshold() -> None:
    """All distances out of fold would be 0, and no image would be farther."""
    features, labels = draw_images(120, num_classes=60)
    assert LinearProbe().fit(features, labels).distance_threshold_ is None
    features, labels = draw_images(180, num_classes=60)
    assert LinearProbe().fit(features, labels).distance_threshold_ > 0
