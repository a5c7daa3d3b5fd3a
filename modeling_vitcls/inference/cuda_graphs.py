"""Repeated passes on a GPU without Python: CUDA graphs of functions of images.

A GPU computes a small model faster than Python starts its kernels, and the threads that decode
photos slow Python down further. A CUDA graph starts all kernels of a pass at once.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Each graph keeps the activations of its pass. Image processors that keep the aspect ratio have any
# number of shapes.
MAX_GRAPHS = 4


class GraphedFunction:
    """A function of images that a GPU repeats as a CUDA graph, with the same bits.

    The first batch of a shape is computed as usual, which also loads the kernels; the second one is
    recorded. While the object is used, the weights may be changed in place, but not replaced; a
    packed model (`pack`) may only be read.

    Args:
        function: function of images [B, C, H, W]. It returns tensors, also in dicts and model
            outputs, and has no side effects.
        device: device of the images. On other devices than CUDA, and with `VITCLS_CUDA_GRAPHS=0`
            in the environment, the function is called every time.
    """

    def __init__(self, function: Callable[[Tensor], Any], device: torch.device) -> None:
        self.function = function
        has_graphs = os.environ.get("VITCLS_CUDA_GRAPHS") != "0"
        self.is_enabled = device.type == "cuda" and has_graphs
        self.shapes: set[torch.Size] = set()
        self.replays: dict[torch.Size, Callable[[Tensor], Any]] = {}

    def __call__(self, images: Tensor) -> Any:
        """Compute the outputs for images [B, C, H, W]."""
        shape = images.shape
        if shape in self.replays:
            return self.replays[shape](images)
        is_new = shape not in self.shapes
        self.shapes.add(shape)
        if is_new or not self.is_enabled or len(self.replays) == MAX_GRAPHS:
            return self.function(images)
        try:
            self.replays[shape] = record_graph(self.function, images)
        except RuntimeError as error:
            self.is_enabled = False
            reason = str(error).splitlines()[0]
            # Once, although each evaluation of a run records again
            logger.warning_once(
                f"without CUDA graphs, because this model cannot be recorded: {reason}"
            )
            return self.function(images)
        return self.replays[shape](images)


def record_graph(function: Callable[[Tensor], Any], images: Tensor) -> Callable[[Tensor], Any]:
    """Record a function of images [B, C, H, W] as a CUDA graph, and return what replays it."""
    inputs = images.clone()
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function(inputs)

    def replay(images: Tensor) -> Any:
        inputs.copy_(images)
        graph.replay()
        return recursively_apply(torch.clone, outputs)  # The next replay overwrites the outputs

    return replay
