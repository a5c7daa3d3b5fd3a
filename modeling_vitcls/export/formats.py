"""Write a graph to a file and run the file in the runtime of its format.

torch     .pt2     torch.export.load, in a separate process that can import torch but not this package
onnx      .onnx    onnxruntime; weights of more than 1.9 GB are written to a second file, FILE.data
openvino  .xml     OpenVINO, with weights in FILE.bin; converted from the ONNX graph
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ..errors import format_error
from ..inference.exported_graphs import INPUT_NAME, ExportedGraph
from .exportable import Outputs
from .tracing import GraphShape, build_dynamic_shapes


# Maximum size of the weights inside an ONNX file, in bytes. The file is a protobuf message, which is limited to 2 GB.
MAX_ONNX_WEIGHTS = 1_900_000_000


@dataclass(frozen=True)
class TracedModel:
    """A traced graph, and settings for writing the graph to a file."""

    graph: ExportedProgram
    graph_shape: GraphShape
    output_names: list[str]  # names of the outputs, in order


@dataclass(frozen=True)
class Format:
    """File format for exported graphs."""

    suffix: str
    packages: tuple[str, ...]  # names of the required packages
    # Function that writes a graph to a file and returns the ONNX opset, or None if the format is not based on ONNX
    write: Callable[[TracedModel, Path], int | None]
    # Function that runs a file on batches of images and returns the outputs of each batch
    run: Callable[[Path, Sequence[torch.Tensor], list[str]], list[Outputs]]
    # Whether the antialiasing filter of the runtime equals PyTorch's filter. OpenVINO uses a different filter, which
    # changes outputs by 1e-4 to 1e-3.
    has_pytorch_antialias_filter: bool = True


# torch ---------------------------------------------------------------------------------------------------------------

RUN_SCRIPT = """
import sys
sys.modules["modeling_vitcls"] = None  # disables imports of this package
import torch
graph = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    torch.save([graph(images) for images in torch.load(sys.argv[2])], sys.argv[3])
"""


def run_torch(file: Path, batches: Sequence[torch.Tensor], names: list[str]) -> list[Outputs]:
    """Run a file in a separate process that cannot import this package, and return the outputs."""
    with tempfile.TemporaryDirectory() as folder:
        inputs_file, outputs_file = Path(folder, "inputs"), Path(folder, "outputs")
        torch.save(list(batches), inputs_file)
        command = [sys.executable, "-I", "-c", RUN_SCRIPT, str(file), str(inputs_file), str(outputs_file)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            reason = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            raise ValueError(f"the written graph does not run in a separate process: {reason[0]}")
        return torch.load(outputs_file)


# ONNX ----------------------------------------------------------------------------------------------------------------


def write_onnx(traced_model: TracedModel, file: Path) -> int:
    """Write a graph to an ONNX file with torch.onnx and return the opset."""
    try:
        program = torch.onnx.export(
            traced_model.graph,
            dynamo=True,
            input_names=[INPUT_NAME],
            output_names=traced_model.output_names,
            dynamic_shapes=build_dynamic_shapes(traced_model.graph_shape),
            verbose=False,
        )
    except Exception as error:  # torch.onnx raises many types of errors
        raise ValueError(f"torch.onnx cannot export this model: {format_error(error)}") from error
    assert program is not None
    for node in program.model.graph:  # names of nodes tell which layer of the model they compute (quantization.py)
        if match := re.search(r"\blayers\.\d+\b", node.metadata_props.get("namespace", "")):
            node.name = f"{match[0]}/{node.name}"
    num_weight_bytes = sum(weight.nbytes for weight in traced_model.graph.state_dict.values())
    program.save(file, external_data=num_weight_bytes > MAX_ONNX_WEIGHTS)
    return program.model.opset_imports[""]


def run_graph(file: Path, batches: Sequence[torch.Tensor], names: list[str]) -> list[Outputs]:
    """Run a file with onnxruntime or OpenVINO in float32 on the CPU, and return the outputs."""
    graph = ExportedGraph(file)
    outputs = [graph(images) for images in batches]
    return [{name: arrays[name] for name in names} for arrays in outputs]


# OpenVINO ------------------------------------------------------------------------------------------------------------


def write_openvino(traced_model: TracedModel, file: Path) -> int:
    """Write a graph to an ONNX file, convert the file with OpenVINO, and return the ONNX opset."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder, "model.onnx")
        opset = write_onnx(traced_model, onnx_file)
        try:
            openvino.save_model(openvino.Core().read_model(onnx_file), file, compress_to_fp16=False)
        except RuntimeError as error:
            raise ValueError(f"OpenVINO cannot read this model: {format_error(error)}") from error
    return opset


ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPENVINO_PACKAGES = ("onnx", "onnxscript", "openvino")

FORMATS: dict[str, Format] = {
    "torch": Format(".pt2", (), lambda traced_model, file: torch.export.save(traced_model.graph, file), run_torch),
    "onnx": Format(".onnx", ONNX_PACKAGES, write_onnx, run_graph),
    "openvino": Format(".xml", OPENVINO_PACKAGES, write_openvino, run_graph, has_pytorch_antialias_filter=False),
}
