"""Scenes among features whose scenes are known."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.random import default_rng
from pytest import LogCaptureFixture

from modeling_vitcls.data.labels import OneLabel
from modeling_vitcls.evaluation.evaluator import build_predictions, count_in_trained_scenes
from modeling_vitcls.frozen.linear_probe import split_folds
from modeling_vitcls.frozen.scenes import (
    TrainedScenes,
    compute_limit,
    describe_scenes,
    keep_together,
)
from modeling_vitcls.inference.features import FeatureLayout, Features


WIDTH = 48
LABELS = OneLabel({"label": ["cup", "pen"]})


def build_features(values: np.ndarray, labels: np.ndarray) -> Features:
    """Build features [N, WIDTH] of one token."""
    number = len(values)
    return Features(
        features=values.astype(np.float32),
        labels=labels,
        indices=np.arange(number),
        names=np.array([f"{index}.jpg" for index in range(number)]),
        groups=np.arange(number),
        layout=FeatureLayout(1, {"mean": WIDTH}),
    )


@pytest.mark.parametrize("num_groups", [200, 90])
def test_photos_of_different_scenes_have_the_folds_of_their_own_groups(num_groups: int) -> None:
    rng = default_rng(0)
    features = build_features(rng.normal(size=(200, WIDTH)), rng.integers(2, size=200))
    features = replace(features, groups=np.arange(200) % num_groups)
    joined, record = keep_together(features, 0.1, LABELS)
    assert record["num_joined"] == record["num_scenes"] == record["num_contradictions"] == 0
    assert describe_scenes(record) is None
    before, after = (split_folds(features.labels, each.groups) for each in (features, joined))
    assert len(before) == 10
    np.testing.assert_equal(after, before)


def test_a_photo_of_a_known_scene_is_counted_and_not_others_of_its_name() -> None:
    """As in a dataset on the Hub, which has names without folders."""
    features = build_features(np.eye(4, WIDTH), np.arange(4) % 2)
    features = replace(features, names=np.full(4, "1.png"), logits=np.eye(4, 2))
    near = TrainedScenes.of(features.take(slice(1)), 0.1).recognize(features)
    record = count_in_trained_scenes(near, build_predictions(LABELS, features))
    assert record["names"] == ["1.png"]
    assert record["others"]["num_images"] == 3


def test_each_pair_with_two_labels_counts_once() -> None:
    """The last photo has ten of twelve shots as neighbors, and is a neighbor of none."""
    values = np.zeros((13, WIDTH))
    values[:, 0] = 1
    values[:12, 1:13] = 0.01 * np.eye(12)
    values[12, 20] = 0.15
    features = build_features(values, np.arange(13) // 12)
    _, record = keep_together(features, 0.1, LABELS)
    assert record["num_contradictions"] == 10
    # To a weak encoder, photos of other scenes are near, too.
    _, record = keep_together(features, 0.02, LABELS)
    assert record["num_contradictions"] == 0
    assert len(record["pairs"]) == 1


def test_without_a_limit_an_evaluation_says_that_shots_count_apart(
    caplog: LogCaptureFixture,
) -> None:
    features = build_features(np.ones((3, WIDTH)), np.zeros(3))
    groups = TrainedScenes.of(features, max_distance=0.0).join_shots(features)
    assert len(set(groups)) == 3
    assert "could not tell scenes apart" in caplog.text


@pytest.mark.parametrize("width, is_told_apart", [(0.05, True), (1.0, False)])
def test_photos_that_are_alike_are_no_shots_of_one_scene(width: float, is_told_apart: bool) -> None:
    """Two kinds of photos, each with near neighbors: shots of a scene, or kinds that vary like digits."""
    position = np.linspace(0, width, 40)
    values = np.zeros((80, WIDTH))
    values[:, 0] = np.repeat([1, -1], 40)
    values[:, 1] = np.tile(position, 2)
    features = build_features(values, np.arange(80) // 40)
    mirrored = build_features(values + 0.04 * np.eye(80, WIDTH, 2), features.labels)
    limit = compute_limit(features, features, mirrored)
    assert (limit > 0) == is_told_apart


@pytest.mark.parametrize("num_things, num_joined", [(8, 40), (1, 3)])
def test_shots_of_a_camera_in_the_hand_are_near_in_a_set_of_scenes(
    num_things: int, num_joined: int
) -> None:
    """Of five shots of a thing, two are farther from the others than shots of a burst."""
    values = np.eye(40, WIDTH)
    for thing in range(num_things):
        shots = slice(5 * thing, 5 * thing + 5)
        values[shots] = values[5 * thing]
        values[shots, 40:45] = np.diag([0.01, 0.01, 0.01, 0.12, 0.12])
    features = build_features(values, np.arange(40) % 2)
    mirrored = build_features(values + 0.07 * np.eye(40, WIDTH)[:, ::-1], features.labels)
    limit = compute_limit(features, features, mirrored)
    _, record = keep_together(features, limit, LABELS)
    assert record["num_joined"] == num_joined
