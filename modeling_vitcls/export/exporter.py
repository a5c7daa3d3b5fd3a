"""Export a checkpoint and compare the outputs of the exported file with the outputs of the model.

    report = export_model("runs/mine", "onnx", Path("mine.onnx"))      # also writes mine.onnx.json

The reference outputs are computed by the model in float32, in eager mode. The outputs of the file are computed by the
runtime of the format, such as onnxruntime. If the outputs differ by more than the limit, nothing is written.
"""

import dataclasses
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import PILImageResampling

from ..configuration_vitcls import ViTCLSConfig
from ..conversion.parity_report import build_random_images, get_max_magnitude, get_non_square_size, hash_files
from ..conversion.processors import SHARED_SETTINGS, select_settings
from ..files import write_json
from ..hub.local_paths import resolve_name, strip_folders
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.exported_graphs import INPUT_NAME
from ..system import get_versions
from .exportable import Outputs, compute_named_outputs, load_exportable_model
from .formats import FORMATS, TracedModel
from .tracing import GraphShape, select_graph_shape, trace_model


# dtype of the graph -> absolute tolerance, and tolerance relative to the largest absolute value of the output.
LIMITS: dict[str, tuple[float, float]] = {"float32": (1e-4, 0.0), "float16": (1e-4, 1e-2), "bfloat16": (1e-4, 8e-2)}


@dataclasses.dataclass(frozen=True)
class BatchComparison:
    """Comparison of the outputs of a file with the outputs of the model for one batch of images."""

    shape: tuple[int, ...]  # (batch size, channels, height, width) of the images
    differences: dict[str, float]  # output name -> largest absolute difference
    magnitudes: dict[str, float]  # output name -> largest absolute value of the model's output


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """Report on an exported file. The report is written to FILE.json next to FILE."""

    format: str
    model: str  # name of the model, without local folders
    model_class: str
    weights: str  # "trained", or "random" for a preset
    dtype: str
    opset: int | None
    limit: tuple[float, float]  # absolute tolerance, and tolerance relative to the magnitude
    largest_differences: dict[str, float]
    tried: list[BatchComparison]  # one comparison per batch
    # Name, dtype, shape (with names of dynamic axes), image sizes and patch size of the input
    input: dict[str, Any]
    outputs: dict[str, list[int | str]]  # output name -> shape, with names of dynamic axes
    # Reason why the image size is fixed although a dynamic size was requested; empty otherwise
    fixed_because: str
    preprocessing: dict[str, Any] | None  # settings of the image processor; None if there is no processor
    labels: dict[str, list[str]]  # output name -> class names
    versions: dict[str, str]
    sha256: dict[str, str]  # file name -> hash


def export_model(
    source: str,
    format_name: str,
    output: Path,
    image_size: tuple[int, int] | None = None,
    dynamic: bool = True,
    dtype: str = "float32",
    opset: int | None = None,
    output_attentions: bool = False,
) -> ExportReport:
    """Export a model to a file, such as mine.onnx, and write a report to mine.onnx.json.

    Args:
        source: A model folder, a model on the Hub, or a preset, which has random weights.
        format_name: "torch", "onnx" or "openvino".
        output: Path of the exported file, with the suffix of the format. The file must not exist.
        image_size: Image size (height, width) in pixels. If `dynamic` is True, the size is used only in the
            comparison. Default: the native image size of the model.
        dynamic: Whether the graph accepts images of different sizes. If a dynamic size is not possible, the report
            states the reason.
        dtype: dtype of weights and computations. Inputs and outputs are always float32.
        opset: ONNX opset. Default: the default opset of torch.onnx.
        output_attentions: Whether the graph also outputs the attention of the CLS tokens (exportable.py).

    Raises:
        ValueError, OSError: If the model cannot be found or exported, if the outputs of the file differ from the
            outputs of the model by more than the limit, if packages are missing, or if `output` is invalid or exists.
            The message is a single line. Nothing is written if an error is raised.
    """
    file_format = FORMATS[format_name]
    if output.suffix != file_format.suffix:
        raise ValueError(f"--output {output}: the file name must end in {file_format.suffix}")
    check_files_do_not_exist(output, get_report_path(output))
    if missing_packages := [name for name in file_format.packages if find_spec(name) is None]:
        raise ValueError(
            f"--format {format_name} requires packages that are not installed: {', '.join(missing_packages)}. Run pip "
            "install 'modeling_vitcls[export]'"
        )
    exportable_model = load_exportable_model(source)
    model = exportable_model.model
    graph_shape = select_graph_shape(model, image_size, dynamic, file_format.has_pytorch_antialias_filter)
    batches = [build_random_images(shape) for shape in select_image_shapes(model.config, graph_shape)]
    reference_outputs = compute_named_outputs(model, batches, output_attentions)
    names = list(reference_outputs[0])
    graph = trace_model(model, graph_shape, getattr(torch, dtype), output_attentions)
    traced_model = TracedModel(graph, graph_shape, names, opset)
    existing_parent = next(folder for folder in output.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=existing_parent) as temporary_folder:
        file = Path(temporary_folder, output.name)
        written_opset = file_format.write(traced_model, file)
        comparisons = compare_outputs(batches, reference_outputs, file_format.run(file, batches, names), dtype)
        report = ExportReport(
            format=format_name,
            model=strip_folders(resolve_name(source, is_built_in=not exportable_model.is_trained)),
            model_class=type(model).__name__,
            weights="trained" if exportable_model.is_trained else "random",
            dtype=dtype,
            opset=written_opset,
            limit=LIMITS[dtype],
            largest_differences={
                name: max(comparison.differences[name] for comparison in comparisons) for name in names
            },
            tried=comparisons,
            input=describe_input(model.config, graph_shape),
            outputs=get_output_shapes(reference_outputs[0], graph_shape),
            fixed_because=graph_shape.fixed_size_reason,
            preprocessing=describe_preprocessing(exportable_model.processor),
            labels=get_label_names(model.config, names),
            versions=get_versions("timm", *file_format.packages),
            sha256=hash_files(Path(temporary_folder).iterdir()),
        )
        write_json(get_report_path(file), dataclasses.asdict(report))
        move_files(Path(temporary_folder), output.parent)
    return report


def get_report_path(file: Path) -> Path:
    """Return the path of the report of an exported file."""
    return file.with_name(f"{file.name}.json")


def check_files_do_not_exist(*files: Path) -> None:
    """Raise ValueError if any of the files exists."""
    for file in files:
        if file.exists():
            raise ValueError(f"{file} exists. Set a different --output, or remove the file")


def move_files(source: Path, target: Path) -> None:
    """Move all files of a folder to another folder. Raise ValueError if the target folder contains a file of the same
    name."""
    files = sorted(source.iterdir())
    check_files_do_not_exist(*(target / file.name for file in files))
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        file.rename(target / file.name)


# Report --------------------------------------------------------------------------------------------------------------


def select_image_shapes(config: ViTCLSConfig, graph_shape: GraphShape) -> list[tuple[int, int, int, int]]:
    """Return the image shapes for the comparison. For a dynamic graph, the shapes include the native, requested and
    smallest sizes, non-square sizes, and a size that is not a multiple of the patch size."""
    if not graph_shape.is_dynamic:
        return [(batch_size, config.num_channels, *graph_shape.image_size) for batch_size in (1, 2, 3)]
    (height, width), (patch_height, patch_width) = graph_shape.image_size, config.patch_height_width
    portrait_width, portrait_height = get_non_square_size((width, height), (patch_width, patch_height))
    batch_sizes = {
        config.image_height_width: 1,
        graph_shape.image_size: 3,
        get_non_square_size((height, width), (patch_height, patch_width)): 2,
        (portrait_height, portrait_width): 1,
        (height + patch_height - 1, width + 1): 2,
        graph_shape.smallest_size: 1,
    }
    min_height, min_width = graph_shape.smallest_size
    return [
        (batch_size, config.num_channels, max(height, min_height), max(width, min_width))
        for (height, width), batch_size in batch_sizes.items()
    ]


def compare_outputs(
    batches: list[torch.Tensor], reference_outputs: list[Outputs], outputs: list[Outputs], dtype: str
) -> list[BatchComparison]:
    """Compare the outputs of a file with the outputs of the model. Raise ValueError if the names or shapes differ, or
    if a difference exceeds `LIMITS`."""
    absolute_limit, relative_limit = LIMITS[dtype]
    comparisons = []
    for images, reference, result in zip(batches, reference_outputs, outputs, strict=True):
        shape = list(images.shape)
        expected_shapes, shapes = (
            [(name, list(output.shape)) for name, output in named_outputs.items()]
            for named_outputs in (reference, result)
        )
        if shapes != expected_shapes:
            raise ValueError(
                f"the written graph must have the outputs {expected_shapes} for images {shape}, but has {shapes}"
            )
        differences = {name: get_max_magnitude(result[name] - reference[name]) for name in reference}
        magnitudes = {name: get_max_magnitude(reference[name]) for name in reference}
        for name, difference in differences.items():
            limit = absolute_limit + relative_limit * magnitudes[name]
            if not difference <= limit:  # also true for NaN
                raise ValueError(
                    f"the output {name} of the written graph differs from that of the model by {difference:.2g} for "
                    f"images {shape}, but the limit in {dtype} is {limit:.2g}"
                )
        comparisons.append(BatchComparison(tuple(shape), differences, magnitudes))
    return comparisons


def describe_input(config: ViTCLSConfig, graph_shape: GraphShape) -> dict[str, Any]:
    """Return the name, dtype, shape, image sizes and patch size of the input."""
    height_width = ["height", "width"] if graph_shape.is_dynamic else graph_shape.image_size
    return {
        "name": INPUT_NAME,
        "dtype": "float32",
        "shape": ["batch", config.num_channels, *height_width],
        "image_size": list(graph_shape.image_size),
        "smallest_image_size": list(graph_shape.smallest_size),
        "patch_size": list(config.patch_height_width),
    }


def get_output_shapes(outputs: Outputs, graph_shape: GraphShape) -> dict[str, list[int | str]]:
    """Return the shape of each output, with names of the dynamic axes."""
    shapes: dict[str, list[int | str]] = {}
    for name, output in outputs.items():
        axes: list[int | str] = ["batch", *output.shape[1:]]
        if graph_shape.is_dynamic and len(axes) == 3:
            axes[1] = "tokens"
        if graph_shape.is_dynamic and len(axes) == 4:
            axes[2:] = ["rows", "columns"]
        shapes[name] = axes
    return shapes


def describe_preprocessing(processor: ViTCLSImageProcessor | None) -> dict[str, Any] | None:
    """Return the image processor settings that are not None, or None if there is no image processor."""
    if processor is None:
        return None
    settings = select_settings(processor, (*SHARED_SETTINGS, "crop_rounding", "do_pad", "pad_size"))
    if "resample" in settings:
        settings["resample"] = PILImageResampling(settings["resample"]).name.lower()
    return settings


def get_label_names(config: ViTCLSConfig, names: list[str]) -> dict[str, list[str]]:
    """Return a dict that maps the name of each logits output to its class names, in the order of the logits."""
    if config.tasks:
        return config.task_labels()
    id2label: dict[Any, str] = dict(config.id2label or {})
    return {name: [id2label[index] for index in range(len(id2label))] for name in names if name.endswith("logits")}
