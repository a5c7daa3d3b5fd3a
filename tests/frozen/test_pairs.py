"""A run asks whether two classes are one kind, where it exchanges them as often as by chance."""

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.random import default_rng

from modeling_vitcls.frozen.linear_probe import LinearProbe
from modeling_vitcls.frozen.pairs import describe_pairs, measure_pairs


NAMES = ["coat", "hat", "shoes", "sneakers"]


def measure(distance: float, num_images: int = 160, num_unsure: int = 0) -> dict | None:
    """Measure four classes of which the last two have this distance between their features.

    A model was unsure about the first `num_unsure` photos.
    """
    generator = default_rng(0)
    labels = np.arange(num_images) % 4
    centers = 5 * np.eye(4, 16)
    centers[3] = centers[2] + distance * np.eye(4, 16)[3]
    features = generator.normal(size=(num_images, 16)) + centers[labels]
    head = SimpleNamespace(
        probe=LinearProbe().fit(features, labels, is_counted=np.arange(num_images) >= num_unsure),
        features=SimpleNamespace(labels=labels),
        labels=SimpleNamespace(names=NAMES),
    )
    return measure_pairs(None, head)


def test_a_kind_that_was_divided_by_chance_is_asked_about() -> None:
    record = measure(0.0)
    assert record["classes"] == ["shoes", "sneakers"]
    line = describe_pairs(record)
    assert f"({record['num_right']} of {record['num_photos']} right): are they one kind?" in line


@pytest.mark.parametrize("distance", [1.5, 5.0])
def test_classes_that_are_told_apart_are_not(distance: float) -> None:
    assert describe_pairs(measure(distance)) is None


@pytest.mark.parametrize(("num_images", "num_unsure"), [(40, 0), (160, 120), (160, 160)])
def test_too_few_photos_that_no_model_chose_measure_nothing(
    num_images: int, num_unsure: int
) -> None:
    assert measure(0.0, num_images, num_unsure) is None
