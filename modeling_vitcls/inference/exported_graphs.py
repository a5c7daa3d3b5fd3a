"""Run graphs that `vitcls export` wrote on the CPU, with onnxruntime or OpenVINO.

outputs = ExportedGraph(Path("model.xml"), precision="bf16")(pixel_values)    # {"logits": [B, labels]}
logits = ExportedModel(Path("model.xml"), config, use_head=True)(pixel_values).logits

`load_exported_model` checks a graph once, before the first image: that it was exported from the
weights of the folder (the hash in its report, FILE.json), and that its outputs have the shapes and
the dtype of the model.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..hub.model_files import BACKEND_FILES, CONFIG_FILE, hash_files
from ..hub.model_folder import ModelFolder
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..runtime.errors import describe_installation, format_error
from ..runtime.files import read_json


INPUT_NAME = "pixel_values"
DISTANCE = "distance"  # output with the distance to the nearest class
# Precision -> OpenVINO's hint. Without a hint, OpenVINO computes in bfloat16 if the CPU can.
OPENVINO_HINTS = {"fp32": "f32", "bf16": "bf16"}


class GraphError(ValueError):
    """Raised if a graph cannot be run, or is not a graph of the model.

    It does not depend on the image, so a prediction stops instead of writing an error for each
    image.
    """


Runner = Callable[[dict[str, Any]], Sequence[Any]]  # arrays by input name -> arrays of the outputs


class ExportedGraph(nn.Module):
    """A graph in a file. It runs in as many threads as PyTorch.

    Args:
        file: An .onnx or .xml file.
        precision: "fp32" or "bf16", for OpenVINO. ONNX files are computed in the dtypes that they
            contain.

    Raises:
        ValueError: If the runtime is not installed, or cannot read the file.
    """

    def __init__(self, file: Path, precision: str = "fp32") -> None:
        super().__init__()
        self.file = file
        try:
            opened = open_openvino(file, precision) if file.suffix == ".xml" else open_onnx(file)
        except ImportError as error:
            raise ValueError(
                f"{file} requires {error.name}. {describe_installation('export')}"
            ) from error
        except Exception as error:  # both runtimes raise undocumented exceptions
            raise ValueError(f"{file} cannot be read: {format_error(error)}") from error
        self.output_names, self.run = opened

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the outputs [B, ...] by name, for images [B, C, H, W].

        Raises:
            GraphError: If the graph does not support the images.
        """
        try:
            arrays = self.run({INPUT_NAME: pixel_values.float().cpu().numpy()})
        except Exception as error:  # both runtimes raise undocumented exceptions
            raise GraphError(
                f"{self.file} cannot be run on images of shape {list(pixel_values.shape)}: "
                f"{format_error(error)}"
            ) from error
        return {
            name: torch.from_numpy(array.copy())
            for name, array in zip(self.output_names, arrays, strict=True)
        }


def open_onnx(file: Path) -> tuple[list[str], Runner]:
    """Open an ONNX file in onnxruntime. Return the names of its outputs, and how to run it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # As many as PyTorch, which a launcher limits if several processes share the machine.
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # only log errors
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return names, lambda inputs: session.run(names, inputs)


@cache
def get_openvino_core() -> Any:
    """Create OpenVINO's core once; it is never released.

    On CPUs with AMX, the core installs a signal stack for the thread that creates it. When another
    thread releases the core, for example while it collects garbage, the stack is unmapped and the
    next signal crashes the process.
    """
    import openvino

    return openvino.Core()


def open_openvino(file: Path, precision: str) -> tuple[list[str], Runner]:
    """Compile an OpenVINO file for the CPU. Return the names of its outputs, and how to run it."""
    hints = {
        "INFERENCE_PRECISION_HINT": OPENVINO_HINTS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled_model = get_openvino_core().compile_model(file, "CPU", hints)
    names = [output.get_any_name() for output in compiled_model.outputs]
    return names, lambda inputs: compiled_model(inputs).to_tuple()


class ExportedModel(nn.Module):
    """An exported graph with the interface of its model, whose weights are not loaded.

    `class_distance` is the name of the output with the distance to the nearest class. It is None if
    the graph has none, and in bfloat16, which has too few digits for it.

    Args:
        file: The exported file.
        config: Configuration of the model.
        use_head: Whether the logits are required, or the final hidden state.
        mixed_precision: "no", or "bf16" for OpenVINO.

    Raises:
        ValueError: If the file cannot be read, or the runtime does not support the precision.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(
        self, file: Path, config: ViTCLSConfig, use_head: bool, mixed_precision: str = "no"
    ) -> None:
        super().__init__()
        supported = ("no", "bf16") if file.suffix == ".xml" else ("no",)
        if mixed_precision not in supported:
            raise ValueError(
                f"{file.name} supports `mixed_precision` {' or '.join(supported)}. Set one of them"
            )
        self.file = file
        self.config = config
        self.use_head = use_head
        self.graph = ExportedGraph(file, "bf16" if mixed_precision == "bf16" else "fp32")
        has_distance = DISTANCE in self.graph.output_names and mixed_precision == "no"
        self.class_distance = DISTANCE if has_distance else None

    @property
    def base_model(self) -> "ExportedModel":
        """The encoder, as in transformers: `last_hidden_state` is an output of this graph."""
        return self

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool = False,
        num_output_tokens: int | None = None,
    ) -> SimpleNamespace:
        """Compute the outputs [B, ...] for images [B, C, H, W], on the device of the images.

        The graph always computes all tokens (`num_output_tokens`).
        """
        if output_hidden_states:
            raise ValueError(
                f"{self.graph.file} has only the outputs of the last layer. Set `backend='torch'`"
            )

        outputs = {
            name: output.to(pixel_values.device)
            for name, output in self.graph(pixel_values).items()
        }

        wrong = [name for name, output in outputs.items() if len(output) != len(pixel_values)]
        if wrong:
            raise GraphError(
                f"{self.file} has {len(outputs[wrong[0]])} rows of {wrong[0]} for "
                f"{len(pixel_values)} images. Export the model that `model` names"
            )

        heads = self.config.extra_heads or {}
        task_logits = {name: outputs[name] for name in heads if name in outputs}
        named = {"distillation_logits": None, **outputs, "task_logits": task_logits or None}
        if self.config.tasks:
            named["logits"] = outputs
        return SimpleNamespace(**named)


def load_exported_model(
    backend: str,
    folder: ModelFolder,
    processor: ViTCLSImageProcessor,
    use_head: bool,
    mixed_precision: str,
) -> ExportedModel:
    """Load a graph, and check that it is one of the model in a folder.

    Args:
        backend: "onnx", "openvino" or the path of an exported file.
        folder: Folder of the model.
        processor: Image processor of the model.
        use_head: Whether the logits are required, or the final hidden state.
        mixed_precision: "no", or "bf16" for OpenVINO.

    Raises:
        ValueError: If there is no such graph, if it cannot be run, if it was exported from other
            weights, or if its outputs are not the outputs of the model.
    """
    file = find_exported_file(backend, folder.path)
    check_weights(file, folder, requires_report=backend in BACKEND_FILES)
    model = ExportedModel(file, folder.config, use_head, mixed_precision)
    check_outputs(model, processor)
    return model


def check_weights(file: Path, folder: ModelFolder, requires_report: bool) -> None:
    """Raise GraphError if a graph was exported from another model than the one in `folder`.

    The report of the graph contains the hashes of the weights and of the configuration, whose
    temperature the graph contains. A graph without a report cannot be
    checked: this is an error if `requires_report` is set. Nothing is checked if the folder has only
    the graph.
    """
    if folder.weights_sha256 is None:
        return

    report_file = file.with_name(f"{file.name}.json")
    command = format_export_command(file, folder.path)
    remedy = (
        "Set `model` to the folder that it was exported from; or, if it is this one, remove "
        f"{file} and {report_file.name}, and repeat `{command}`"
    )
    if not report_file.is_file():
        if requires_report:
            raise GraphError(
                f"{file} may belong to other weights, because {report_file.name} is missing. "
                f"{remedy}"
            )
        return

    report = read_json(report_file)
    files = [file.with_name(name) for name in report.get("sha256", {})]
    hashes = {  # what is wrong if the recorded hash is not the current one
        f"{file} was exported from other weights than those in {folder.path}": (
            report.get("weights_sha256"),
            folder.weights_sha256,
        ),
        f"{CONFIG_FILE} has changed since {file} was exported": (
            report.get("config_sha256"),
            hash_files([folder.path / CONFIG_FILE]),
        ),
        f"{file} has changed since {report_file.name} was written": (
            report.get("sha256", {}),
            hash_files(filter(Path.is_file, files)),
        ),
    }
    for problem, (recorded, current) in hashes.items():
        if recorded != current:
            raise GraphError(f"{problem}. {remedy}")


def check_outputs(model: ExportedModel, processor: ViTCLSImageProcessor) -> None:
    """Run a graph on a blank image.

    Raises:
        GraphError: If the outputs do not have the shapes of the model's outputs, or are not
            floating-point numbers.
    """
    config: Any = model.config
    image = torch.zeros(config.num_channels, *config.image_height_width, dtype=torch.uint8)
    inputs = processor(image, input_data_format="channels_first", return_tensors="pt")
    pixel_values = inputs[INPUT_NAME]  # [1, C, H, W]
    outputs = model.graph(pixel_values)

    if model.use_head:
        label_counts = {task: len(labels) for task, labels in config.task_labels().items()}
        label_counts = label_counts or {"logits": config.num_labels}
        shapes = {name: [1, count] for name, count in label_counts.items()}
        if "distillation_logits" in outputs:
            shapes["distillation_logits"] = [1, config.num_labels]
    else:
        rows, columns = config.get_grid_size(pixel_values.shape[2:])
        num_tokens = config.token_layout.get_num_tokens(rows, columns)
        shapes = {"last_hidden_state": [1, num_tokens, config.hidden_size]}

    for name, shape in shapes.items():
        output = outputs.get(name)
        if output is None or list(output.shape) != shape or not output.is_floating_point():
            found = f"no output {name}"
            if output is not None:
                dtype = str(output.dtype).removeprefix("torch.")
                found = f"an output {name} of {dtype} {list(output.shape)}"
            raise GraphError(
                f"{model.file} has {found} for one image, but the model has floats of shape "
                f"{shape}. Export the model that `model` names"
            )


def find_exported_file(backend: str, folder: Path) -> Path:
    """Find the file that a backend runs.

    Args:
        backend: "onnx" or "openvino" for model.onnx or model.xml in the folder, or the path of an
            exported file.
        folder: Folder of the model.

    Raises:
        ValueError: If there is no such file.
    """
    file = folder / BACKEND_FILES[backend][0] if backend in BACKEND_FILES else Path(backend)
    if not file.is_file() or file.suffix not in (".onnx", ".xml"):
        command = format_export_command(file, folder)
        raise ValueError(f"`backend={backend!r}` requires {file}, written by `{command}`")
    return file


def format_export_command(file: Path, folder: Path) -> str:
    """Format the command that writes a graph of the model in a folder."""
    file_format = "openvino" if file.suffix == ".xml" else "onnx"
    return f"vitcls export --model {folder} --format {file_format} --output {file}"
