"""Write a graph to an ONNX file, run the file with onnxruntime, and compare it with the model.

    write_onnx(graph, shape, ["logits"], Path("mine.onnx"), {"license": "mit"})
    OnnxGraph(Path("mine.onnx"))(pixel_values)              # {"logits": [B, labels]}
    shapes = select_image_shapes(config, graph_shape)
    comparisons = measure_differences(batches, reference_outputs, outputs, LIMITS["float32"])

Weights of more than 1.9 GB are written to a second file, FILE.data.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..conversion.parity_report import compare_outputs, get_non_square_size
from ..model.configuration_vitcls import ViTCLSConfig
from ..runtime.errors import format_error
from .tracing import INPUT_NAME, GraphShape, Outputs


# Maximum size of the weights inside an ONNX file, in bytes. The file is a protobuf message, which
# is limited to 2 GB.
MAX_ONNX_WEIGHTS = 1_900_000_000


def write_onnx(
    graph: ExportedProgram,
    graph_shape: GraphShape,
    names: list[str],
    file: Path,
    metadata: Mapping[str, Any],
) -> None:
    """Write a graph to an ONNX file with torch.onnx.

    Args:
        graph: The traced graph.
        graph_shape: The image sizes that it accepts.
        names: Names of the outputs.
        file: An .onnx file.
        metadata: What the file says about itself (`metadata_props`): name -> value, as JSON.

    Raises:
        ValueError: If torch.onnx does not support the graph.
    """
    try:
        program = torch.onnx.export(
            graph,
            dynamo=True,
            input_names=[INPUT_NAME],
            output_names=names,
            dynamic_shapes=graph_shape.dynamic_shapes,
            verbose=False,
        )
    except Exception as error:  # torch.onnx raises many types of errors
        raise ValueError(f"torch.onnx cannot export this model: {format_error(error)}") from error
    assert program is not None, "torch.onnx returns a program if `dynamo` is set"

    # The names of the nodes tell which layer they compute: a person who quantizes the file can
    # leave a layer in float32 (docs/exporting.md).
    for node in program.model.graph:
        if match := re.search(r"\blayers\.\d+\b", node.metadata_props.get("namespace", "")):
            node.name = f"{match[0]}/{node.name}"

    for name, value in metadata.items():
        program.model.metadata_props[name] = json.dumps(value)

    num_weight_bytes = sum(weight.nbytes for weight in graph.state_dict.values())
    program.save(file, external_data=num_weight_bytes > MAX_ONNX_WEIGHTS)


class OnnxGraph:
    """An ONNX file. It runs on the CPU, in as many threads as PyTorch."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # A launcher limits PyTorch's threads if several processes share the machine.
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # Log only errors
        self.session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, pixel_values: Tensor) -> Outputs:
        """Compute the outputs [B, ...] by name, for images [B, C, H, W]."""
        names = [output.name for output in self.session.get_outputs()]
        arrays = self.session.run(names, {INPUT_NAME: pixel_values.numpy()})
        return dict(zip(names, map(torch.from_numpy, arrays), strict=True))


# Differences from the model, on random images -----------------------------------------------------


ABSOLUTE_LIMIT = 1e-4  # Tolerance of small outputs
# Data type of the graph -> further tolerance, relative to the largest absolute value of the output
LIMITS = {"float32": 1e-4, "float16": 1e-2}


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
    batches: list[Tensor],
    reference_outputs: list[Outputs],
    outputs: list[Outputs],
    relative_limit: float,
) -> list[dict[str, Any]]:
    """Find the largest differences between the outputs of a file and of the model, by batch.

    Raise ValueError if the names or shapes differ, or if a difference exceeds `ABSOLUTE_LIMIT` and
    `relative_limit` together.
    """
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
            limit = ABSOLUTE_LIMIT + relative_limit * comparison["magnitudes"][name]
            # Written with `not`, so NaN also raises the error.
            if not difference <= limit:
                raise ValueError(
                    f"the output {name} of the written graph differs from the model's output by "
                    f"{difference:.2g} for images {shape}, but the limit is {limit:.2g}"
                )
        comparisons.append({"shape": shape, **comparison})
    return comparisons
