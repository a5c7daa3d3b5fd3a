"""Compare the outputs of a graph with the outputs of its model, on random images.

shapes = select_image_shapes(config, graph_shape)
comparisons = measure_differences(batches, reference_outputs, outputs, LIMITS["float32"])
"""

from typing import Any

import torch

from ..conversion.parity_report import compare_outputs, get_non_square_size
from ..inference.prediction_rows import DISTANCE
from ..model.configuration_vitcls import ViTCLSConfig
from .exportable import Outputs
from .tracing import GraphShape


# Data type of the graph -> absolute tolerance, and tolerance relative to the largest absolute value of
# the output.
LIMITS: dict[str, tuple[float, float]] = {"float32": (1e-4, 0.0), "float16": (1e-4, 1e-2)}
# Relative tolerance of the distance to the nearest class, as a difference of large numbers
DISTANCE_LIMIT = 1e-4


def select_image_shapes(
    config: ViTCLSConfig, graph_shape: GraphShape
) -> list[tuple[int, int, int, int]]:
    """Choose the image shapes for the comparison.

    For a dynamic graph, the shapes include the native, requested and smallest sizes, non-square
    sizes, and a size that is not a multiple of the patch size.
    """
    # torch.export sometimes turns the size of the example into a constant. Only other batch sizes
    # show that it has not.
    if not graph_shape.is_dynamic:
        return [
            (batch_size, config.num_channels, *graph_shape.image_size) for batch_size in (1, 2, 3)
        ]
    (height, width), (patch_height, patch_width) = graph_shape.image_size, config.patch_height_width
    batch_sizes = {
        config.image_height_width: 1,
        graph_shape.image_size: 3,
        get_non_square_size((height, width), (patch_height, patch_width)): 2,
        (height + patch_height, width + 1): 1,
        graph_shape.smallest_size: 1,
    }
    min_height, min_width = graph_shape.smallest_size
    return [
        (batch_size, config.num_channels, max(height, min_height), max(width, min_width))
        for (height, width), batch_size in batch_sizes.items()
    ]


def measure_differences(
    batches: list[torch.Tensor],
    reference_outputs: list[Outputs],
    outputs: list[Outputs],
    limits: tuple[float, float],
) -> list[dict[str, Any]]:
    """Find the largest differences between the outputs of a file and of the model, by batch.

    Raise ValueError if the names or shapes differ, or if a difference exceeds the limits
    (`LIMITS`).
    """
    absolute_limit, relative_limit = limits
    comparisons = []
    for images, reference, result in zip(batches, reference_outputs, outputs, strict=True):
        shape = list(images.shape)
        expected_shapes, shapes = (
            {name: list(output.shape) for name, output in named_outputs.items()}
            for named_outputs in (reference, result)
        )
        if shapes != expected_shapes:
            raise ValueError(
                f"the written graph must have the outputs {expected_shapes} for images {shape}, "
                f"but has {shapes}"
            )
        comparison = compare_outputs(result, reference)
        for name, difference in comparison["differences"].items():
            own_limit = DISTANCE_LIMIT if name == DISTANCE else 0.0
            magnitude = comparison["magnitudes"][name]
            limit = absolute_limit + max(relative_limit, own_limit) * magnitude
            # Written with `not`, so NaN also raises the error.
            if not difference <= limit:
                raise ValueError(
                    f"the output {name} of the written graph differs from the model's output by "
                    f"{difference:.2g} for images {shape}, but the limit is {limit:.2g}"
                )
        comparisons.append({"shape": shape, **comparison})
    return comparisons
