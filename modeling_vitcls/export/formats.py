"""Write a graph to a file for a runtime.

onnx      .onnx    onnxruntime; weights of more than 1.9 GB are written to a second file, FILE.data
openvino  .xml     OpenVINO, with weights in FILE.bin; converted from the ONNX graph
"""

import re
import tempfile
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ..inference.exported_graphs import INPUT_NAME
from ..runtime.errors import format_error
from .tracing import GraphShape


# Maximum size of the weights inside an ONNX file, in bytes. The file is a protobuf message, which
# is limited to 2 GB.
MAX_ONNX_WEIGHTS = 1_900_000_000


SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}


def write_graph(
    graph: ExportedProgram, graph_shape: GraphShape, names: list[str], file: Path
) -> None:
    """Write a graph to a file in the format of its suffix. OpenVINO reads the graph from ONNX.

    Args:
        graph: The traced graph.
        graph_shape: The image sizes that it accepts.
        names: Names of the outputs.
        file: An .onnx or .xml file.

    Raises:
        ValueError: If torch.onnx or OpenVINO does not support the graph.
    """
    if file.suffix == ".onnx":
        write_onnx(graph, graph_shape, names, file)
        return
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder, "model.onnx")
        write_onnx(graph, graph_shape, names, onnx_file)
        try:
            # OpenVINO would store the weights in float16 by default.
            openvino.save_model(openvino.Core().read_model(onnx_file), file, compress_to_fp16=False)
        except RuntimeError as error:
            raise ValueError(f"OpenVINO cannot read this model: {format_error(error)}") from error


# ONNX ---------------------------------------------------------------------------------------------


def write_onnx(
    graph: ExportedProgram, graph_shape: GraphShape, names: list[str], file: Path
) -> None:
    """Write a graph to an ONNX file with torch.onnx."""
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

    # names of nodes tell which layer of the model they compute (quantization.py)
    for node in program.model.graph:
        if match := re.search(r"\blayers\.\d+\b", node.metadata_props.get("namespace", "")):
            node.name = f"{match[0]}/{node.name}"

    num_weight_bytes = sum(weight.nbytes for weight in graph.state_dict.values())
    program.save(file, external_data=num_weight_bytes > MAX_ONNX_WEIGHTS)
