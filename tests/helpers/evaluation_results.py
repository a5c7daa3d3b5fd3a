"""Outputs from which the metrics of the scenarios of evaluation_worker.py can be computed."""

from typing import Any

import torch
from pytest import approx

from helpers.evaluation_worker import build_classifier, build_labeled_images
from modeling_vitcls import ViTCLSImageProcessor


@torch.no_grad()
def compute_outputs(name: str) -> tuple[Any, list[Any]]:
    """Return the model's outputs for all images of a scenario in one batch, and the labels."""
    pictures = build_labeled_images(name)
    processor = ViTCLSImageProcessor(size=16)
    pixel_values = processor(list(pictures.images), return_tensors="pt")["pixel_values"]
    return build_classifier(name)(pixel_values), list(pictures.labels)


def close(value: float) -> Any:
    return approx(value, abs=2e-6)
