"""Export a checkpoint and compare the outputs of the exported file with the outputs of the model.

    report = export_model(ExportOptions(model="runs/mine", output=Path("mine.onnx")))   # also writes mine.onnx.json

The reference outputs are computed by the model in float32, in eager mode, and the outputs of the
file by onnxruntime. If the outputs differ by more than the limit, nothing is written.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import PILImageResampling

from ..conversion.parity_report import build_random_images, compare_outputs, get_non_square_size
from ..conversion.processors import SHARED_SETTINGS, select_settings
from ..data.labels import get_label_space
from ..hub.local_paths import resolve_name, strip_folders
from ..hub.model_files import CONFIG_FILES, GRAPH_FILE, RESULTS_FILE, SPLITS_FILE, hash_files
from ..hub.model_folder import ModelFolder
from ..inference.onnx_graph import INPUT_NAME, OnnxGraph
from ..inference.prediction_rows import DISTANCE
from ..inference.speed import measure_inference_speed
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import ViTCLSBackbone
from ..runtime.errors import describe_installation
from ..runtime.files import write_json
from ..runtime.staging import create_output_files
from ..runtime.system import get_versions
from .exportable import NamedOutputsModel, Outputs, load_exportable_model
from .onnx_file import write_onnx
from .options import ExportOptions
from .tracing import GraphShape, select_graph_shape, trace_model


# dtype of the graph -> absolute tolerance, and tolerance relative to the largest absolute value of
# the output.
LIMITS: dict[str, tuple[float, float]] = {"float32": (1e-4, 0.0), "float16": (1e-4, 1e-2)}
# relative tolerance of the distance to the nearest class, as a difference of large numbers
DISTANCE_LIMIT = 1e-4
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@torch.no_grad()
def export_model(options: ExportOptions) -> dict[str, Any]:
    """Export a model to a file, such as mine.onnx, and write a report to mine.onnx.json.

    Args:
        options: The flags of `vitcls export`.

    Returns:
        The contents of the report (docs/exporting.md). If a dynamic image size is not possible, the
        report states the reason.

    Raises:
        ValueError, OSError: If the model cannot be found or exported, if the outputs of the file
            differ from the outputs of the model by more than the limit, if packages are missing, or
            if `output` is invalid or exists. The message is a single line. Nothing is written if an error is raised.
    """
    # A wrong file name or a missing package is reported before anything is downloaded.
    target = choose_target(options.output)
    model: Any
    model, processor, folder = load_exportable_model(options.model)
    graph_shape = select_graph_shape(model, options.image_size, options.dynamic)
    has_native_size = (
        graph_shape.is_dynamic or graph_shape.image_size == model.config.image_height_width
    )
    graph = trace_model(model, graph_shape, getattr(torch, options.dtype))
    named_model = NamedOutputsModel(model)
    batches = list(map(build_random_images, select_image_shapes(model.config, graph_shape)))
    reference_outputs = list(map(named_model, batches))
    names = list(reference_outputs[0])

    with create_output_files(target, last=f"{target.name}.json") as output_folder:
        file = output_folder / target.name
        write_onnx(graph, graph_shape, names, file)
        onnx_graph = OnnxGraph(file, model.config)
        outputs = list(map(onnx_graph, batches))
        comparisons = measure_differences(
            batches, reference_outputs, outputs, LIMITS[options.dtype]
        )

        report: dict[str, Any] = {
            "format": options.format,
            "file": file.name,
            "model": strip_folders(resolve_name(options.model)),
            "dtype": options.dtype,
            "limit": LIMITS[options.dtype],
            "largest_differences": {
                name: max(each["differences"][name] for each in comparisons) for name in names
            },
            "tried": comparisons,
            **describe_graph(
                file, model, processor, folder, graph_shape, outputs=reference_outputs[0]
            ),
            "versions": get_versions("timm", *PACKAGES),
        }
        if has_native_size and not isinstance(model, ViTCLSBackbone):
            report["speed"] = measure_inference_speed(onnx_graph, torch.device("cpu"))

        if folder is not None and not options.output.suffix:
            copy_model_files(folder, output_folder, report)
        write_json(Path(f"{file}.json"), report)
        # Again, because the names of all files are known only now, such as FILE.data for large
        # weights, and because another program may have written one of them meanwhile.
        check_files_do_not_exist(*(target.parent / each.name for each in output_folder.iterdir()))
    return report


def choose_target(output: Path) -> Path:
    """Choose the file to write: `output`, or model.onnx in the folder `output`.

    Raise ValueError if its name has another suffix, if it exists, or if packages are missing.
    """
    target = output if output.suffix else output / GRAPH_FILE
    if target.suffix != ".onnx":
        raise ValueError(
            f"`output={str(output)!r}`: the file name must end in .onnx, or have no suffix"
        )
    check_files_do_not_exist(target, Path(f"{target}.json"))
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(
            f"the export requires packages that are not installed: {', '.join(missing)}. "
            f"{describe_installation('export')}"
        )
    return target


def describe_graph(
    file: Path,
    model: Any,
    processor: ViTCLSImageProcessor | None,
    folder: ModelFolder | None,
    graph_shape: GraphShape,
    outputs: Outputs,
) -> dict[str, Any]:
    """Describe the inputs, the outputs and the size of a graph.

    Args:
        file: The graph, in a folder that has no other files.
        model, processor, folder: As `load_exportable_model` returns them.
        graph_shape: The image sizes of the graph.
        outputs: The outputs of the model for some images.
    """
    height_width = ["height", "width"] if graph_shape.is_dynamic else graph_shape.image_size
    files = list(file.parent.iterdir())
    report: dict[str, Any] = {
        "model_class": type(model).__name__,
        "weights": "random" if folder is None else "trained",
        "input": {
            "name": INPUT_NAME,
            "dtype": "float32",
            "shape": ["batch", model.config.num_channels, *height_width],
            "image_size": list(graph_shape.image_size),
            "smallest_image_size": list(graph_shape.smallest_size),
            "patch_size": list(model.config.patch_height_width),
        },
        "outputs": get_output_shapes(outputs, graph_shape),
        "fixed_because": graph_shape.fixed_size_reason,
        "preprocessing": describe_preprocessing(processor),
        "labels": get_label_names(model.config, list(outputs)),
        "sha256": hash_files(files),
        "num_bytes": sum(each.stat().st_size for each in files),
    }
    if folder is not None:
        report["weights_sha256"] = folder.weights_sha256
    return report


def copy_model_files(model_folder: ModelFolder, folder: Path, report: dict[str, Any]) -> None:
    """Write what `vitcls evaluate` requires in the folder of the graph.

    These are the configuration, the image processor, the splits of the model's run and, in
    results.json, the measurements of the file.
    """
    for name in (*CONFIG_FILES, SPLITS_FILE):
        if (model_folder.path / name).is_file():
            shutil.copyfile(model_folder.path / name, folder / name)
    # The accuracies in results.json were measured with PyTorch. Only what was measured with the
    # graph describes the graph.
    kept_keys = ("label_column", "label_separator", "dataset")
    results = model_folder.results_of_any_weights
    kept = {key: results[key] for key in kept_keys if key in results}
    measured = {"weights_sha256": report["weights_sha256"], "files": {report["file"]: report}}
    write_json(folder / RESULTS_FILE, kept | measured)


def check_files_do_not_exist(*files: Path) -> None:
    """Raise ValueError if any of the files exists."""
    for file in files:
        if file.exists():
            raise ValueError(f"{file} exists. Set a different `output`, or remove the file")


# Report -------------------------------------------------------------------------------------------


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
    portrait_width, portrait_height = get_non_square_size(
        (width, height), (patch_width, patch_height)
    )
    batch_sizes = {
        config.image_height_width: 1,
        graph_shape.image_size: 3,
        get_non_square_size((height, width), (patch_height, patch_width)): 2,
        (portrait_height, portrait_width + 1): 1,
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


def get_output_shapes(outputs: Outputs, graph_shape: GraphShape) -> dict[str, list[int | str]]:
    """List the shape of each output, with names of the dynamic axes."""
    # axes 1 of tokens [B, N, D], and 2 and 3 of feature maps [B, C, H, W]
    dynamic_axes = {3: {1: "tokens"}, 4: {2: "rows", 3: "columns"}}
    shapes: dict[str, list[int | str]] = {}
    for name, output in outputs.items():
        names = dynamic_axes.get(output.ndim, {}) if graph_shape.is_dynamic else {}
        sizes = enumerate(output.shape[1:], start=1)
        shapes[name] = ["batch", *(names.get(axis, size) for axis, size in sizes)]
    return shapes


def describe_preprocessing(processor: ViTCLSImageProcessor | None) -> dict[str, Any] | None:
    """List the settings of the image processor that are not None; None without a processor."""
    if processor is None:
        return None
    settings = select_settings(processor, (*SHARED_SETTINGS, "crop_rounding", "do_pad", "pad_size"))
    if "resample" in settings:
        settings["resample"] = PILImageResampling(settings["resample"]).name.lower()
    return settings


def get_label_names(config: ViTCLSConfig, names: list[str]) -> dict[str, list[str]]:
    """List the class names of each logits output, in the order of the logits."""
    labels = config.task_labels()
    if not config.tasks:
        class_names = get_label_space(config).names
        labels = {name: class_names for name in names if name.endswith("logits")}
    return labels | {name: head.labels for name, head in config.get_added_tasks().items()}
