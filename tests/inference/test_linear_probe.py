"""Choice and result of a linear classifier of frozen features."""

import numpy as np
import pytest
from helpers.tiny_models import raises_one_line
from sklearn.metrics import log_loss
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling_vitcls.inference.linear_probe import LinearProbe
from modeling_vitcls.runtime import progress


CLS, MEAN = (-1, "cls"), (-1, "mean")


def draw_images(
    num_images: int, seed: int = 0, num_classes: int = 4
) -> tuple[dict[tuple[int, str], np.ndarray], np.ndarray]:
    """Return CLS tokens with the class and means without it, and labels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(num_images) % num_classes
    centers = np.random.default_rng(1).normal(size=(num_classes, 16))
    features = {
        CLS: centers[labels] + generator.normal(size=(num_images, 16)),
        MEAN: generator.normal(size=(num_images, 16)),
    }
    return features, labels


def test_tokens_without_the_class_are_not_chosen() -> None:
    probe = LinearProbe().fit(*draw_images(120))
    assert probe.candidate_.pooling != "mean"


def test_it_is_an_estimator_of_scikit_learn() -> None:
    features, labels = draw_images(120)
    pipeline = make_pipeline(StandardScaler(), LinearProbe())
    assert cross_val_score(pipeline, features[CLS], labels).min() > 0.8


def test_a_long_cross_validation_shows_its_folds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
        low, high = probe.estimate_.interval
        assert low <= accuracy <= high
        differences.append(probe.estimate_.value - accuracy)
    assert abs(np.mean(differences)) < 0.05


def test_images_of_a_group_are_predicted_without_their_copies() -> None:
    features, labels = draw_images(40, num_classes=2)
    noise = {
        token: np.random.default_rng(3).normal(size=each.shape) for token, each in features.items()
    }
    copies = {token: np.concatenate([each, each]) for token, each in noise.items()}
    both = np.concatenate([labels, labels])
    probe = LinearProbe().fit(copies, both, groups=np.arange(80) % 40)
    assert probe.estimate_ is not None
    assert probe.estimate_.value < 0.8


def test_labels_may_be_names_and_a_class_may_have_one_image() -> None:
    features, labels = draw_images(60, num_classes=2)
    names = np.array(["ant", "bee"])[labels].astype(object)
    names[0] = "cat"
    probe = LinearProbe().fit(features, names.astype(str))
    assert probe.classes_.tolist() == ["ant", "bee", "cat"]
    assert np.isnan(probe.out_of_fold_[0]).all()
    assert np.isfinite(probe.out_of_fold_[1:]).all()
    assert set(probe.predict(features)) <= {"ant", "bee", "cat"}


def test_classes_that_the_choice_lacked_are_added_to_its_probabilities() -> None:
    """Of very many classes, the images of the choice may lack some."""
    features, labels = draw_images(60, num_classes=4)
    names = np.array(["ant", "bee", "cat", "dog"])[labels]
    some = np.isin(names, ["ant", "cat", "dog"])
    probe = LinearProbe().fit({token: each[some] for token, each in features.items()}, names[some])
    before = probe.out_of_fold_
    probe.refit(features, names)
    assert probe.classes_.tolist() == ["ant", "bee", "cat", "dog"]
    assert np.array_equal(probe.out_of_fold_[:, [0, 2, 3]], before)
    assert not probe.out_of_fold_[:, 1].any()


def test_one_image_is_an_error() -> None:
    features, labels = draw_tags(1, 0)
    with raises_one_line("two readable images", "Add images"):
        LinearProbe().fit(features, labels)


def test_one_tag_has_no_temperature() -> None:
    features, labels = draw_tags(40, 0)
    probe = LinearProbe().fit(features, labels[:, :1])
    assert all("temperature" not in row for row in probe.table_)


def test_two_images_are_too_few_for_folds() -> None:
    features, labels = draw_images(2, num_classes=2)
    probe = LinearProbe().fit(features, labels)
    assert probe.num_folds_ == 0
    assert probe.estimate_ is None
    assert probe.predict_proba(features).shape == (2, 2)


def test_the_temperature_of_five_images_per_class_suits_the_classifier_of_all_of_them() -> None:
    def draw_tokens(num_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(num_images) % 4
        centers = np.random.default_rng(1).normal(size=(4, 64)) / 2
        return centers[labels] + np.random.default_rng(seed).normal(size=(num_images, 64)), labels

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
    generator = np.random.default_rng(seed)
    labels = generator.random((num_images, 4)) < [0.5, 0.5, 0.1, 0]
    labels[:, 1] &= labels[:, 0]
    labels[0, 3] = True
    centers = np.random.default_rng(1).normal(size=(4, 16))
    features = {
        CLS: labels @ centers + generator.normal(size=(num_images, 16)),
        MEAN: generator.normal(size=(num_images, 16)),
    }
    return features, labels.astype(np.float32)


def test_several_labels_have_calibrated_probabilities() -> None:
    probe = LinearProbe().fit(*draw_tags(120, 0))
    features, labels = draw_tags(2000, 1)
    probabilities = probe.predict_proba(features)
    losses = [log_loss(labels[:, index], probabilities[:, index]) for index in range(3)]
    shares = [
        log_loss(labels[:, index], np.full(2000, labels[:, index].mean())) for index in range(3)
    ]
    assert np.all(np.array(losses) < 0.6 * np.array(shares))
    assert probe.candidate_.pooling != "mean"
    assert np.isfinite(probe.losses_).all()
    assert np.mean(probe.losses_) == pytest.approx(sum(losses) / 4, abs=0.04)
    assert probe.estimate_ is not None
    assert probe.estimate_.metric == "mean_average_precision"
    assert probe.predict(features)[:, 0].tolist() == (probabilities[:, 0] > 0.5).tolist()


def test_a_label_of_one_image_has_its_smoothed_share() -> None:
    probe = LinearProbe().fit(*draw_tags(120, 0))
    assert probe.predict_proba(draw_tags(50, 1)[0])[:, 3] == pytest.approx(2 / 122)


def test_tags_of_three_images_are_too_few_for_folds() -> None:
    features, labels = draw_tags(3, 0)
    probe = LinearProbe().fit(features, labels)
    shares = (labels.sum(axis=0) + 1) / 5
    assert probe.predict_proba(features) == pytest.approx(np.tile(shares, (3, 1)))
