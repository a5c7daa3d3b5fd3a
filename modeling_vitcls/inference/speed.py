"""Cost of a model: inference speed, as the median over a few forward passes, and FLOPs."""

import copy
import statistics
import timeit
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


MAX_SPEED_BATCH_SIZE = 32  # Maximum batch size in images
NUM_REPEATS = 3  # Number of measured forward passes
MEASUREMENT_SECONDS = 0.5  # Approximate duration of the measurement in seconds


@torch.no_grad()  # A model that trains afterwards must not keep tensors of inference mode
def measure_cpu_speed(model: Any) -> float:
    """Measure the median speed of a model on the CPU in images per second.

    The batch size is 32, or smaller if the measurement would otherwise take too long.
    """
    config = model.config
    image = torch.rand(1, config.num_channels, *config.image_height_width, dtype=model.dtype)
    # The first pass allocates memory and chooses kernels. The second one shows how many images fit
    # into the time.
    *_, seconds = timeit.repeat(partial(model, image), repeat=2, number=1)
    batch_size = int(MEASUREMENT_SECONDS / NUM_REPEATS / seconds)
    batch = image.repeat(max(1, min(MAX_SPEED_BATCH_SIZE, batch_size)), 1, 1, 1)
    measured = timeit.repeat(partial(model, batch), repeat=NUM_REPEATS, number=1)
    return len(batch) / statistics.median(measured)


@torch.no_grad()
def count_flops(model: Any) -> int:
    """Count the FLOPs of a forward pass of one image, on the meta device.

    `torch.utils.flop_counter` counts matrix products and convolutions; a multiply-add counts as
    two.
    """
    config = copy.deepcopy(model.config)
    # The counter supports fused kernels only on some devices
    config._attn_implementation = "eager"

    with torch.device("meta"):
        counted = model.new_like(config).eval()
        pixel_values = torch.empty(1, config.num_channels, *config.image_height_width)
        with FlopCounterMode(display=False) as counter:
            counted(pixel_values)
    return int(counter.get_total_flops())
