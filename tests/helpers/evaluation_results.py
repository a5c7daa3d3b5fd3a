"""Metrics of the scenarios of evaluation_worker.py, and outputs to compute them from."""

from typing import Any

import pytest
import torch

from helpers.evaluation_worker import build_classifier, build_labeled_images, evaluate_all
from modeling_vitcls import ViTCLSImageProcessor
from modeling_vitcls.runtime.distributed import build_accelerator


@pytest.fixture(scope="module")
def by_one_process() -> dict[str, Any]:
    """Return the metrics of all scenarios of evaluation_worker.py."""
    return evaluate_all(build_accelerator())


@torch.no_grad()
def compute_outputs(name: str) -> tuple[Any, list[Any]]:
    """Return the model's outputs for all images of a scenario in one batch, and the labels."""
    pictures = build_labeled_images(name)
    processor = ViTCLSImageProcessor(size=16)
    pixel_values = processor(list(pictures.images), return_tensors="pt")["pixel_values"]
    return build_classifier(name)(pixel_values), list(pictures.labels)


def close(value: float) -> Any:
    return pytest.approx(value, abs=2e-6)
