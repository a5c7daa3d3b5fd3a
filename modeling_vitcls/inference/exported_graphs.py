"""Run graphs that `vitcls export` wrote: ONNX files with onnxruntime, and OpenVINO files with OpenVINO, on the CPU.

outputs = ExportedGraph(Path("model.xml"), precision="bf16")(pixel_values)    # {"logits": [B, labels]}
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import format_error


INPUT_NAME = "pixel_values"
BACKEND_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
# Precision -> OpenVINO's hint. Without a hint, OpenVINO computes in bfloat16 wherever the CPU supports it.
OPENVINO_HINTS = {"fp32": "f32", "bf16": "bf16"}

Runner = Callable[[dict[str, Any]], dict[str, Any]]  # arrays by input name -> arrays by output name


class ExportedGraph(nn.Module):
    """A graph in a file. The threads are those of PyTorch.

    Args:
        file: An .onnx or .xml file.
        precision: "fp32" or "bf16", for OpenVINO. ONNX files are computed in the dtypes that they contain.

    Raises:
        ValueError: If the runtime is not installed, or cannot read the file.
    """

    def __init__(self, file: Path, precision: str = "fp32") -> None:
        super().__init__()
        self.file = file
        try:
            self.run = open_openvino(file, precision) if file.suffix == ".xml" else open_onnx(file)
        except ImportError as error:
            raise ValueError(f"{file} requires {error.name}. Run pip install 'modeling_vitcls[export]'") from error
        except Exception as error:  # both runtimes raise undocumented exceptions
            raise ValueError(f"{file} cannot be read: {format_error(error)}") from error

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs [B, ...] by name, for images [B, C, H, W]."""
        try:
            outputs = self.run({INPUT_NAME: pixel_values.float().cpu().numpy()})
        except Exception as error:
            raise ValueError(
                f"{self.file} cannot be run on images of shape {list(pixel_values.shape)}: {format_error(error)}"
            ) from error
        return {name: torch.from_numpy(array.copy()) for name, array in outputs.items()}


def open_onnx(file: Path) -> Runner:
    """Open an ONNX file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # only log errors
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def open_openvino(file: Path, precision: str) -> Runner:
    """Compile an OpenVINO file for the CPU."""
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": OPENVINO_HINTS[precision], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled_model = openvino.Core().compile_model(file, "CPU", hints)
    names = [output.get_any_name() for output in compiled_model.outputs]

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        arrays = compiled_model(inputs)
        return {name: arrays[name] for name in names}

    return run


def use_backend(model: Any, backend: str, folder: Path) -> None:
    """Let the forward passes of a model run an exported graph. Labels, configuration and weights stay.

    Args:
        model: The model that was exported.
        backend: "torch" (no change), "onnx" or "openvino" for model.onnx or model.xml in `folder`, or the path of an
            exported file.
        folder: Folder of the model.

    Raises:
        ValueError: If the file does not exist, cannot be run, or lacks the outputs of the model.
    """
    if backend == "torch":
        return
    suffix = BACKEND_SUFFIXES.get(backend)
    file = folder / f"model{suffix}" if suffix else Path(backend)
    if not file.is_file() or file.suffix not in BACKEND_SUFFIXES.values():
        raise ValueError(
            f"--backend {backend} requires {file}, written by `vitcls export --model {folder} --format "
            f"{backend if suffix else 'onnx'} --output {file}`"
        )
    graph = ExportedGraph(file)
    config = model.config
    names = list(config.task_labels()) or (["logits"] if hasattr(model, "classifier") else ["last_hidden_state"])

    def forward(pixel_values: torch.Tensor, **arguments: Any) -> SimpleNamespace:
        outputs = graph(pixel_values)
        if missing := [name for name in names if name not in outputs]:
            raise ValueError(f"{file} has no output {missing[0]}. Export the model that --model names")
        outputs = {name: output.to(pixel_values.device) for name, output in outputs.items()}
        if config.tasks:
            return SimpleNamespace(logits=outputs)
        return SimpleNamespace(**{"distillation_logits": None, "hidden_states": None} | outputs)

    model.forward = forward
    model.exported_file = file
