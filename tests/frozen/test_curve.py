"""A run says whether more photos would help, and only where this is above the noise."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import CLS
from numpy.random import default_rng
from pytest import approx

from modeling_vitcls.frozen.curve import (
    describe_learning_curve,
    measure_learning_curve,
)
from modeling_vitcls.frozen.linear_probe import LinearProbe


NAMES = ["coat", "Größe 40", "hat", "t-shirt"]


def measure(distance: float, num_images: int = 200) -> tuple[dict[str, Any] | None, LinearProbe]:
    """Measure the curve of four classes with this distance between their features."""
    generator = default_rng(0)
    labels = np.arange(num_images) % 4
    features = generator.normal(size=(num_images, 64))
    features += distance * default_rng(1).normal(size=(4, 64))[labels]
    probe = LinearProbe().fit({CLS: features}, labels)
    images = SimpleNamespace(
        labels=labels, groups=np.arange(num_images), get_tokens=lambda: {CLS: features}
    )
    head = SimpleNamespace(
        probe=probe,
        features=SimpleNamespace(take=lambda rows: images),
        labels=SimpleNamespace(names=NAMES),
    )
    data = None
    return measure_learning_curve(data, head), probe


def test_more_photos_help_where_the_classes_are_hard_to_tell_apart() -> None:
    curve, probe = measure(0.3, 400)
    assert curve is not None
    assert curve["num_images"] == [160, 320]
    half, full = curve["accuracy"]
    assert full == approx(probe.table_[0]["accuracy"], abs=0.1)
    assert full - half == approx(curve["gain"])
    text = f"more photos would help: {half:.0%} with 160, {full:.0%} with 320 training photos"
    assert describe_learning_curve(curve) == text


@pytest.mark.parametrize("distance", [0.0, 3.0])
def test_nothing_is_said_where_the_curve_is_noise_or_flat(distance: float) -> None:
    curve, _ = measure(distance)
    assert curve is not None
    assert describe_learning_curve(curve) is None


def test_a_handful_of_photos_has_no_curve() -> None:
    assert measure(1.0, 32)[0] is None
