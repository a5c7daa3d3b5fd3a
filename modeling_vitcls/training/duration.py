"""Expected duration of a run, measured before its first step.

The first batches pass the model forward and backward.

The measurement leaves no trace: gradients are discarded, buffers are restored, and the steps use
the batches again.
"""

import itertools
import math
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from ..data.batches import Batch


MIN_SECONDS = 600  # runs that take longer print their expected duration
NUM_MEASURED_IMAGES = 2  # in each of two forward passes
MIN_BATCHES = 20  # in shorter runs, the measurement would take too large a part of the time


def describe_duration(loop: Any, batches: Iterator[Batch]) -> tuple[Iterator[Batch], str | None]:
    """Return the batches, and the expected duration of the remaining steps as text.

    The text is None if the duration is below `MIN_SECONDS` or not measured.
    """
    num_steps = loop.plan.num_steps - loop.state.step
    num_batches = num_steps * loop.plan.accumulation_steps
    # the first passes of a compiled model are compiled
    if num_batches < MIN_BATCHES or loop.options.compile:
        return batches, None

    first = next(batches)
    batch_seconds = measure_pass(loop, iter([first]))  # slower than later passes
    if estimate_seconds(loop, batch_seconds) < MIN_SECONDS:
        return itertools.chain([first], batches), None
    batches, again = itertools.tee(batches)
    batch_seconds = measure_pass(loop, again)
    del again  # otherwise, all batches would be kept
    batches = itertools.chain([first], batches)

    seconds = estimate_seconds(loop, batch_seconds)
    duration = timedelta(minutes=math.ceil(seconds / 60))
    step_seconds = batch_seconds * loop.plan.accumulation_steps
    text = (
        f"about {duration} (hours:minutes:seconds): {num_steps:,} steps of {step_seconds:.1f} s, "
        "and evaluations"
    )
    return batches, text if seconds >= MIN_SECONDS else None


@torch.no_grad()
def measure_forward_seconds(model: Any, accelerator: Accelerator) -> float:
    """Return the seconds of a forward pass of one image, averaged over processes.

    The first of two passes warms up.
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
    return float(accelerator.reduce(torch.tensor(seconds, device=accelerator.device), "mean"))


def measure_pass(loop: Any, batches: Iterator[Batch]) -> float:
    """Return the seconds of a batch, from reading to its backward pass, averaged over processes."""
    model = loop.state.model
    accelerator = loop.accelerator
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    start_time = time.perf_counter()
    batch = send_to_device(next(batches), accelerator.device)
    accelerator.backward(loop.objective(model, batch)["loss"])
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start_time

    model.zero_grad()
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    return float(accelerator.reduce(torch.tensor(seconds, device=accelerator.device), "mean"))


def estimate_seconds(loop: Any, batch_seconds: float) -> float:
    """Return the expected duration of the remaining steps and evaluations."""
    plan = loop.plan
    num_steps = plan.num_steps - loop.state.step
    seconds = num_steps * plan.accumulation_steps * batch_seconds
    num_evaluations = max(math.ceil(plan.count_epochs(num_steps) / loop.options.evaluate_every), 1)

    if loop.evaluation_seconds:  # of the frozen model
        return seconds + num_evaluations * loop.evaluation_seconds[-1]
    images = getattr(loop.evaluate_model, "images", None)
    if images is None:
        return seconds

    # A backward pass takes twice as long as a forward pass.
    forward_seconds = batch_seconds / 3 / (plan.batch_size * plan.num_processes)
    return seconds + num_evaluations * len(images) * forward_seconds
