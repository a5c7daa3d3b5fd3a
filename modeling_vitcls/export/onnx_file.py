"""Write a graph to an ONNX file, and run the file with onnxruntime.

    write_onnx(graph, shape, ["logits"], Path("mine.onnx"))
    OnnxGraph(Path("mine.onnx"))(pixel_values)              # {"logits": [B, labels]}

Weights of more than 1.9 GB are written to a second file, FILE.data.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..runtime.errors import format_error
from .exportable import Outputs
from .tracing import INPUT_NAME, GraphShape


# Maximum size of the weights inside an ONNX file, in bytes. The file is a protobuf message, which
# is limited to 2 GB.
MAX_ONNX_WEIGHTS = 1_900_000_000


def write_onnx(
    graph: ExportedProgram,
    graph_shape: GraphShape,
    names: list[str],
    file: Path,
    metadata: Mapping[str, Any] | None = None,
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

    for name, value in (metadata or {}).items():
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

    def __call__(self, pixel_values: torch.Tensor) -> Outputs:
        """Compute the outputs [B, ...] by name, for images [B, C, H, W]."""
        names = [output.name for output in self.session.get_outputs()]
        arrays = self.session.run(names, {INPUT_NAME: pixel_values.numpy()})
        return dict(zip(names, map(torch.from_numpy, arrays), strict=True))
