"""Expected duration of a run: before its steps from forward passes, and then from its first steps."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from ..data.sampling import BatchPlan


NUM_MEASURED_IMAGES = 2  # in each of two forward passes
# After so many steps, a run prints its duration. The first step is slower than the others.
NUM_TIMED_STEPS = 3
MIN_STEPS = 20  # a shorter run has ended before its duration helps anyone
FORWARD_PASSES_OF_STEP = 3  # a backward pass takes as long as two forward passes


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


def describe_duration(
    plan: BatchPlan,
    step: int,
    step_seconds: Sequence[float],
    num_evaluated_images: int,
    evaluate_every: int,
    memory: int,
) -> str:
    """Say how long the steps after `step` and their evaluations take, and the peak memory in bytes.

    `step_seconds` are durations of the first steps of this process.
    """
    num_steps = plan.num_steps - step
    # The fastest of the first steps, because compilation and allocation slow the others down.
    seconds = min(step_seconds)
    image_seconds = seconds / FORWARD_PASSES_OF_STEP / plan.images_per_step
    num_evaluations = max(math.ceil(plan.count_epochs(num_steps) / evaluate_every), 1)
    total = num_steps * seconds + num_evaluations * num_evaluated_images * image_seconds
    return (
        f"about {format_minutes(total)}: {num_steps:,} more steps of {seconds:.2g} s, and "
        f"evaluations; {memory / 2**20:,.0f} MiB of memory per process"
    )


def format_minutes(seconds: float) -> str:
    """Write a duration in whole minutes."""
    minutes = math.ceil(seconds / 60)
    return "a minute" if minutes == 1 else f"{minutes:,} minutes"
