"""Cost of a model: inference speed, as the median over a few forward passes, and FLOPs."""

import copy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


NUM_IMAGES = 8  # of a pass that is measured


@torch.no_grad()  # A model that trains afterwards must not keep tensors of inference mode
def measure_cpu_speed(model: Any) -> float:
    """Measure the median speed of a model on the CPU in images per second, for about half a second."""
    from torch.utils.benchmark import Timer  # Slow to import

    config = model.config
    size = (config.num_channels, *config.image_height_width)
    images = torch.rand(NUM_IMAGES, *size, dtype=model.dtype)
    names = {"model": model, "images": images}
    timer = Timer("model(images)", globals=names, num_threads=torch.get_num_threads())
    return NUM_IMAGES / timer.blocked_autorange(min_run_time=0.5).median


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
