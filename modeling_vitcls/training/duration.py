"""Expected duration of the steps of a run, from two forward passes."""

import math
import time
from typing import Any

import torch
from accelerate import Accelerator


NUM_MEASURED_IMAGES = 2  # In each of two forward passes
FORWARD_PASSES_OF_STEP = 3  # A backward pass takes as long as two forward passes


@torch.no_grad()
def measure_step_seconds(
    model: Any, accelerator: Accelerator, epochs: float, num_images: int
) -> float:
    """Estimate the duration of the steps of a run in seconds, from a forward pass.

    The pass is measured on all processes. The first of two passes warms up.

    Args:
        model: model to train.
        accelerator: the accelerator, which defines the device, the precision and the processes.
        epochs: number of epochs.
        num_images: number of training images.
    """
    config = model.config
    images = torch.zeros(NUM_MEASURED_IMAGES, config.num_channels, *config.image_height_width).to(
        accelerator.device
    )
    is_training = model.training
    model.to(accelerator.device).eval()
    seconds = 0.0
    for _ in range(2):
        start_time = time.perf_counter()
        with accelerator.autocast():
            model(images)
        seconds = (time.perf_counter() - start_time) / NUM_MEASURED_IMAGES
    model.train(is_training)
    local_seconds = torch.tensor(seconds, device=accelerator.device)
    image_seconds = FORWARD_PASSES_OF_STEP * float(accelerator.reduce(local_seconds, "mean"))
    return image_seconds * epochs * num_images / accelerator.num_processes


def format_minutes(seconds: float) -> str:
    """Write a duration in whole minutes."""
    minutes = math.ceil(seconds / 60)
    return "a minute" if minutes == 1 else f"{minutes:,} minutes"
