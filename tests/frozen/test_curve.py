"""A run says whether more photos would help, and only where this is above the noise."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import linregress

from modeling_vitcls.frozen.curve import (
    describe_learning_curve,
    measure_learning_curve,
)
from modeling_vitcls.frozen.linear_probe import LinearProbe


CLS = (-1, "cls")
NAMES = ["coat", "Größe 40", "hat", "t-shirt"]


def measure(distance: float, num_images: int = 200) -> tuple[dict[str, Any] | None, LinearProbe]:
    """Measure the curve of four classes with this distance between their features."""
    generator = np.random.default_rng(0)
    labels = np.arange(num_images) % 4
    features = generator.normal(size=(num_images, 64))
    features += distance * np.random.default_rng(1).normal(size=(4, 64))[labels]
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
    curve, probe = measure(0.3)
    assert curve is not None
    assert curve["num_images"] == [40, 80, 120, 160]
    assert curve["accuracy"][-1] == pytest.approx(probe.table_[0]["accuracy"], abs=0.1)
    assert curve["accuracy"][-1] > curve["accuracy"][0] + 0.1
    assert "more photos would help" in str(describe_learning_curve(curve))


def test_the_line_says_the_accuracies_of_a_curve_through_those_that_were_measured() -> None:
    curve, _ = measure(0.3)
    assert curve is not None
    fitted = linregress(np.log(curve["num_images"]), curve["accuracy"])
    expected = fitted.intercept + fitted.slope * np.log(curve["num_images"])
    assert curve["fitted"] == pytest.approx(expected, abs=1e-3)
    curve["accuracy"][-1] = curve["accuracy"][-2] - 0.02
    assert f"{expected[-1]:.0%} with 160 training photos" in str(describe_learning_curve(curve))


@pytest.mark.parametrize("distance", [0.0, 3.0])
def test_nothing_is_said_where_the_curve_is_noise_or_flat(distance: float) -> None:
    curve, _ = measure(distance)
    assert curve is not None
    assert describe_learning_curve(curve) is None


def test_a_handful_of_photos_has_no_curve() -> None:
    assert measure(1.0, 32)[0] is None
