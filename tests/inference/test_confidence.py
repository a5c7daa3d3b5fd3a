"""Temperature, as in torch, and the divisor of a mean confidence."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from modeling_vitcls.inference.confidence import (
    fit_temperature,
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
    assert fit_temperature(logits, logits.argmin(axis=1)) == pytest.approx(100, rel=1e-3)
