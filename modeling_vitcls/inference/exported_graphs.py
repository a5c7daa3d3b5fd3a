"""Run graphs that `vitcls export` wrote: ONNX files with onnxruntime, and OpenVINO files with OpenVINO, on the CPU.

outputs = ExportedGraph(Path("model.xml"), precision="bf16")(pixel_values)    # {"logits": [B, labels]}
logits = ExportedModel(Path("model.xml"), config, use_head=True)(pixel_values).logits
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..configuration_vitcls import ViTCLSConfig
from ..errors import describe_installation, format_error


INPUT_NAME = "pixel_values"
# Backend -> files that it reads in a model folder. Large ONNX files have their weights in a second file.
BACKEND_FILES = {"onnx": ("model.onnx", "model.onnx.data"), "openvino": ("model.xml", "model.bin")}
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
            raise ValueError(f"{file} requires {error.name}. {describe_installation('export')}") from error
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


@cache
def get_openvino_core() -> Any:
    """Return OpenVINO's core, which is never released.

    On CPUs with AMX, the core installs a signal stack for the thread that creates it. When another thread releases the
    core, for example while it collects garbage, the stack is unmapped and the next signal crashes the process.
    """
    import openvino

    return openvino.Core()


def open_openvino(file: Path, precision: str) -> Runner:
    """Compile an OpenVINO file for the CPU."""
    hints = {"INFERENCE_PRECISION_HINT": OPENVINO_HINTS[precision], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled_model = get_openvino_core().compile_model(file, "CPU", hints)
    names = [output.get_any_name() for output in compiled_model.outputs]
    return lambda inputs: dict(zip(names, compiled_model(inputs).to_tuple(), strict=True))


class ExportedModel(nn.Module):
    """An exported graph with the interface of the model that was exported, whose weights are not loaded.

    Args:
        file: The exported file.
        config: Configuration of the model.
        use_head: Whether the logits are required, or the final hidden state.
        mixed_precision: "no", or "bf16" for OpenVINO.

    Raises:
        ValueError: If the file cannot be read, or the runtime does not support the precision.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, file: Path, config: ViTCLSConfig, use_head: bool, mixed_precision: str = "no") -> None:
        super().__init__()
        supported = ("no", "bf16") if file.suffix == ".xml" else ("no",)
        if mixed_precision not in supported:
            raise ValueError(f"{file.name} supports --mixed-precision {' or '.join(supported)}. Set one of them")
        self.config, self.use_head = config, use_head
        weights_file = file.with_suffix(".bin") if file.suffix == ".xml" else Path(f"{file}.data")
        self.files = [file, *filter(Path.is_file, [weights_file])]
        self.graph = ExportedGraph(file, "bf16" if mixed_precision == "bf16" else "fp32")

    @property
    def base_model(self) -> "ExportedModel":
        """The encoder, as in transformers: `last_hidden_state` is an output of this graph."""
        return self

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, num_output_tokens: int | None = None
    ) -> SimpleNamespace:
        """Return the outputs [B, ...] of the model for images [B, C, H, W], on the device of the images. The graph
        always computes all tokens (`num_output_tokens`)."""
        if output_hidden_states:
            raise ValueError(f"{self.graph.file} has only the outputs of the last layer. Set --backend torch")
        outputs = {name: output.to(pixel_values.device) for name, output in self.graph(pixel_values).items()}
        tasks = self.config.task_labels() if self.use_head else {}
        for name in tasks or ["logits" if self.use_head else "last_hidden_state"]:
            if name not in outputs:
                raise ValueError(f"{self.graph.file} has no output {name}. Export the model that --model names")
        return SimpleNamespace(**{"logits": outputs} if tasks else {"distillation_logits": None} | outputs)


def find_exported_file(backend: str, folder: Path) -> Path:
    """Return the file that a backend runs.

    Args:
        backend: "onnx" or "openvino" for model.onnx or model.xml in the folder, or the path of an exported file.
        folder: Folder of the model.

    Raises:
        ValueError: If there is no such file.
    """
    file = folder / BACKEND_FILES[backend][0] if backend in BACKEND_FILES else Path(backend)
    if not file.is_file() or file.suffix not in (".onnx", ".xml"):
        command = f"vitcls export --model {folder} --output {file}"
        raise ValueError(f"--backend {backend} requires {file}, written by `{command}`")
    return file
