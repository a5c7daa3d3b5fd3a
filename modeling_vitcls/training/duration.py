"""Expected duration of the steps of a run, from its speed without steps."""

import math
from typing import Any

import torch
from accelerate import Accelerator

from ..inference.speed import measure_inference_speed


FORWARD_PASSES_OF_STEP = 3  # A backward pass takes as long as two forward passes


def measure_step_seconds(
    model: Any, accelerator: Accelerator, epochs: float, num_images: int
) -> float:
    """Estimate the duration of the steps of a run in seconds, from the speed of forward passes.

    The speed is measured on all processes.

    Args:
        model: model to train.
        accelerator: the accelerator, which defines the device, the precision and the processes.
        epochs: number of epochs.
        num_images: number of training images.
    """
    is_training = model.training
    model.to(accelerator.device).eval()
    with accelerator.autocast():
        speed = measure_inference_speed(model, accelerator.device)["images_per_second"]
    model.train(is_training)
    speeds = accelerator.reduce(torch.tensor(speed, device=accelerator.device), "sum")
    return FORWARD_PASSES_OF_STEP * epochs * num_images / float(speeds)


def format_minutes(seconds: float) -> str:
    """Write a duration in whole minutes."""
    minutes = math.ceil(seconds / 60)
    return "a minute" if minutes == 1 else f"{minutes:,} minutes"
