"""Cost of a model: inference speed, of the fastest of a few forward passes, and FLOPs."""

import copy
import timeit
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


BATCH_SIZE = 8  # Passes of 32 images of a large model would take minutes


@torch.no_grad()  # A model that trains afterwards must not keep tensors of inference mode
def measure_cpu_speed(model: Any) -> float:
    """Measure the speed of a model on the CPU in images per second."""
    config = model.config
    images = torch.rand(
        BATCH_SIZE, config.num_channels, *config.image_height_width, dtype=model.dtype
    )
    # The first pass allocates memory and chooses kernels, and other programs may delay any.
    return BATCH_SIZE / min(timeit.repeat(partial(model, images), repeat=3, number=1))


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
        if getattr(model, "class_distance", None) is not None:
            counted.class_distance.is_valid = model.class_distance.is_valid
        pixel_values = torch.empty(1, config.num_channels, *config.image_height_width)
        with FlopCounterMode(display=False) as counter:
            counted(pixel_values)
    return int(counter.get_total_flops())
