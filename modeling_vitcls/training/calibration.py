"""Calibration of a trained classifier: the temperature and the energy threshold in its configuration.

They are fitted to the selection images or, without selection images, to half of the held-out images. The calibration
error is reported for the other half, or for all held-out images.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error

from ..inference.confidence import find_energy_threshold, fit_temperature
from ..inference.evaluator import Evaluator
from ..inference.per_image import get_outputs


MIN_IMAGES = 100  # minimum number of images for a temperature; with fewer, it is mostly noise
FITTED, REPORTED = slice(0, None, 2), slice(1, None, 2)  # the halves of the held-out images


def calibrate(config: Any, evaluator: Evaluator, images: slice = slice(None)) -> dict[str, Any] | None:
    """Set `temperature` and `energy_threshold` of the configuration, and return both and the number of images; None if
    there are too few. `images` selects images of the evaluator's last evaluation, which kept the logits."""
    logits, labels = get_outputs(evaluator, images)
    if len(labels) < MIN_IMAGES:
        return None
    config.temperature = round(fit_temperature(logits, labels), 4)
    config.energy_threshold = round(find_energy_threshold(logits / config.temperature), 6)
    return {
        "temperature": config.temperature,
        "energy_threshold": config.energy_threshold,
        "num_images": len(labels),
    }


def rescale(evaluator: Evaluator, temperature: float) -> float:
    """Divide the logits of the last evaluation by the temperature, as the calibrated model does, and return the
    cross-entropy. All other metrics except the calibration error do not depend on the temperature."""
    evaluator.rows = [replace(row, logits=row.logits / temperature) for row in evaluator.rows]
    logits, labels = map(torch.from_numpy, get_outputs(evaluator))
    return round(float(cross_entropy(logits.double(), labels)), 6)


def compute_calibration_errors(evaluator: Evaluator, temperature: float, images: slice) -> dict[str, float]:
    """Return the expected calibration error (15 bins) of the last evaluation, and what it was before calibration."""
    logits, labels = map(torch.from_numpy, get_outputs(evaluator, images))

    def compute(scaled: torch.Tensor) -> float:
        return round(float(multiclass_calibration_error(scaled.softmax(dim=1), labels, scaled.shape[1], n_bins=15)), 6)

    return {"calibration_error_before": compute(logits * temperature), "calibration_error": compute(logits)}
