"""The file formats: how a graph is written, and what the file answers in the runtime that it is meant for.

torch     .pt2     torch.export.load, in a process of its own that has torch alone
onnx      .onnx    onnxruntime; weights beyond 2 GB stand in a second file, FILE.data
openvino  .xml     OpenVINO, with its weights in FILE.bin; made from the ONNX graph
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from .exportable import INPUT, Answers
from .tracing import Plan, first_line, open_shapes


# An ONNX file is one protobuf message, which may not be longer than 2 GB.
LARGEST_IN_ONE_FILE = 1_900_000_000  # bytes of weights


@dataclass(frozen=True)
class Traced:
    """A graph to be written.

    Attributes:
        names: of its answers, in order.
        opset: of ONNX; None for the exporter's own choice.
    """

    graph: ExportedProgram
    plan: Plan
    names: list[str]
    opset: int | None


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        write: writes the graph, and returns the ONNX opset where there is one.
        answers: what the file answers to each batch of images.
        packages: what has to be installed.
        has_antialias: whether it shrinks as PyTorch does; OpenVINO's answers were 1e-4 to 1e-3 away.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[Traced, Path], int | None]
    answers: Callable[[Path, Sequence[torch.Tensor], list[str]], list[Answers]]
    has_antialias: bool = True

    def missing_packages(self) -> list[str]:
        """Those that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


# torch ---------------------------------------------------------------------------------------------------------------

IN_A_FRESH_PROCESS = """
import sys
sys.modules["modeling_vitcls"] = None  # importing it fails
import torch
graph = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    torch.save([graph(images) for images in torch.load(sys.argv[2])], sys.argv[3])
"""


def write_torch(traced: Traced, file: Path) -> None:
    """Save with torch.export.save."""
    torch.export.save(traced.graph, file)


def torch_answers(file: Path, batches: Sequence[torch.Tensor], names: list[str]) -> list[Answers]:
    """What the file answers where this package does not exist.

    Raises:
        ValueError: if it cannot be loaded or run there.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "asked"), Path(folder, "answered")
        torch.save(list(batches), asked)
        command = [sys.executable, "-I", "-c", IN_A_FRESH_PROCESS, str(file), str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            why = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise ValueError(f"the written graph does not run in a fresh process: {why[0]}")
        return torch.load(answered)


# ONNX ----------------------------------------------------------------------------------------------------------------


def write_onnx(traced: Traced, file: Path) -> int:
    """Export with torch.onnx; returns the opset.

    Raises:
        ValueError: for operations that ONNX does not have.
    """
    try:
        program = torch.onnx.export(
            traced.graph,
            dynamo=True,
            input_names=[INPUT],
            output_names=traced.names,
            dynamic_shapes=open_shapes(traced.plan),
            opset_version=traced.opset,
            verbose=False,
        )
    except Exception as error:  # whatever the exporter raises for what it does not know
        raise ValueError(f"torch.onnx cannot export this model: {first_line(error)}") from error
    assert program is not None
    num_bytes = sum(weight.nbytes for weight in traced.graph.state_dict.values())
    program.save(file, external_data=num_bytes > LARGEST_IN_ONE_FILE)
    opset = program.model.opset_imports[""]
    if traced.opset not in (None, opset):
        raise ValueError(f"--opset {traced.opset}: torch.onnx gives this model opset {opset}: leave the flag out")
    return opset


def onnx_answers(file: Path, batches: Sequence[torch.Tensor], names: list[str]) -> list[Answers]:
    """What onnxruntime answers on the CPU.

    Raises:
        ValueError: if it cannot load or run the file.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        return [named(names, session.run(names, {INPUT: images.numpy()})) for images in batches]
    except Exception as error:  # onnxruntime's own types, none of which it documents
        raise ValueError(f"onnxruntime does not run the written graph on the CPU: {first_line(error)}") from error


# OpenVINO ------------------------------------------------------------------------------------------------------------


def write_openvino(traced: Traced, file: Path) -> int:
    """Export to ONNX, and let OpenVINO read and save it; returns the opset of the former.

    Raises:
        ValueError: for operations that either does not have.
    """
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        between = Path(folder, "model.onnx")
        opset = write_onnx(traced, between)
        try:
            openvino.save_model(openvino.Core().read_model(between), file, compress_to_fp16=False)
        except RuntimeError as error:
            raise ValueError(f"OpenVINO cannot read this model: {first_line(error)}") from error
    return opset


def openvino_answers(file: Path, batches: Sequence[torch.Tensor], names: list[str]) -> list[Answers]:
    """What OpenVINO answers on the CPU, calculating in float32: left alone it takes bfloat16 where that is faster.

    Raises:
        ValueError: if it cannot load or run the file.
    """
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    try:
        compiled = openvino.Core().compile_model(file, "CPU", settings)
        answers = [compiled({INPUT: images.numpy()}) for images in batches]
        return [named(names, [answer[name] for name in names]) for answer in answers]
    except RuntimeError as error:
        raise ValueError(f"OpenVINO does not run the written graph on the CPU: {first_line(error)}") from error


def named(names: list[str], arrays: Sequence[Any]) -> Answers:
    """Arrays as tensors, by name."""
    return {name: torch.from_numpy(array.copy()) for name, array in zip(names, arrays, strict=True)}


ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPENVINO_PACKAGES = ("onnx", "onnxscript", "openvino")

FORMATS: dict[str, Format] = {
    "torch": Format(".pt2", (), write_torch, torch_answers),
    "onnx": Format(".onnx", ONNX_PACKAGES, write_onnx, onnx_answers),
    "openvino": Format(".xml", OPENVINO_PACKAGES, write_openvino, openvino_answers, has_antialias=False),
}
