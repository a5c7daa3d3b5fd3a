"""Export a checkpoint and compare the outputs of the exported file with the outputs of the model.

    report = export_model(ExportOptions(model="runs/mine", output=Path("mine.onnx")))   # also writes mine.onnx.json

    output -> check -> Exportable -> graph -> file -> report

The reference outputs are computed by the model in float32, in eager mode, and the outputs of the
file by onnxruntime. If the outputs differ by more than the limit, nothing is written.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import PILImageResampling

from ..conversion.parity_report import build_random_images
from ..conversion.processors import SHARED_SETTINGS, select_settings
from ..data.aspect_ratio import get_resize, set_resize
from ..data.labels import get_label_space
from ..hub.local_paths import resolve_name, strip_folders
from ..hub.model_files import CONFIG_FILE, GRAPH_FILE, PROCESSOR_FILE, hash_files, hash_settings
from ..inference.prediction_rows import DISTANCE
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..runtime.errors import describe_installation
from ..runtime.files import write_json
from ..runtime.staging import lock_folder, stage_files
from ..runtime.system import get_versions
from ..version import __version__
from .onnx_file import LIMITS, OnnxGraph, measure_differences, select_image_shapes, write_onnx
from .options import ExportOptions
from .tracing import (
    INPUT_NAME,
    Exportable,
    GraphShape,
    NamedOutputsModel,
    load_exportable_model,
    select_graph_shape,
    trace_model,
)


@torch.no_grad()
def export_model(options: ExportOptions) -> dict[str, Any]:
    """Export a model to a file, such as mine.onnx, and write a report to mine.onnx.json.

    Args:
        options: The flags of `vitcls export`.

    Returns:
        The contents of the report. If a dynamic image size is not possible, it states the reason.

    Raises:
        ValueError, OSError: If the model cannot be found or exported, if the outputs of the file
            differ from the outputs of the model by more than the limit, if packages are missing, or
            if `output` is invalid or exists. The message is a single line. Nothing is written if an
            error is raised.
    """
    # A wrong file name or a missing package is reported before anything is downloaded.
    target = options.output
    if not target.suffix:
        target = target / GRAPH_FILE
    check_target(target)
    exportable = load_exportable_model(options.model)
    model = exportable.model
    shape = select_graph_shape(model, options.image_size, options.dynamic)
    fit_processor(exportable.processor, shape)
    program = trace_model(model, shape, getattr(torch, options.dtype))
    batches = list(map(build_random_images, select_image_shapes(model.config, shape)))
    expected = list(map(NamedOutputsModel(model), batches))

    report_name = f"{target.name}.json"
    with (
        lock_folder(target.parent, "output"),
        stage_files(target.parent, report_name) as folder,
    ):
        file = folder / target.name
        description = build_model_record(exportable, list(expected[0]))
        write_onnx(program, shape, list(expected[0]), file, description)
        graph = OnnxGraph(file)
        outputs = list(map(graph, batches))
        comparisons = measure_differences(batches, expected, outputs, LIMITS[options.dtype])
        report = {
            "model": strip_folders(resolve_name(options.model)),
            "dtype": options.dtype,
            **description,
            **build_file_record(shape, file, graph, comparisons),
        }
        if not options.output.suffix and not (options.output / CONFIG_FILE).exists():
            # What a program needs in addition to the graph, if the folder is not the model's
            model.config.to_json_file(folder / CONFIG_FILE)
            exportable.processor.to_json_file(folder / PROCESSOR_FILE)
        write_json(folder / report_name, report)
    return report


def check_target(target: Path) -> None:
    """Raise ValueError if a file has another suffix or exists, or packages are missing."""
    if target.suffix != ".onnx":
        raise ValueError(f"`output={str(target)!r}`: a file must end in .onnx")
    for file in (target, Path(f"{target}.json"), Path(f"{target}.data")):
        if file.exists():
            raise ValueError(f"{file} exists. Set a different `output`, or remove the file")
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(
            f"the export requires packages that are not installed: {', '.join(missing)}. "
            f"{describe_installation('export')}"
        )


def fit_processor(processor: Any, shape: GraphShape) -> None:
    """Make an image processor return the size of a graph, if the graph accepts only one."""
    if not shape.is_dynamic:
        set_resize(processor, get_resize(processor), shape.image_size)


# The report of the file, FILE.json (docs/exporting.md) --------------------------------------------


PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def build_model_record(exportable: Exportable, names: list[str]) -> dict[str, Any]:
    """Describe a model for a program that has its graph alone: preprocessing, labels, threshold.

    `names` are the outputs of the graph.
    """
    model, processor, folder = exportable
    config = model.config
    # The class names of each logits output, in the order of the logits
    labels = config.task_labels()
    if not config.tasks:
        class_names = get_label_space(config).names
        labels = {name: class_names for name in names if name.endswith("logits")}
    added = {name: head.labels for name, head in config.get_added_tasks().items()}
    return {
        "model_class": type(model).__name__,
        "weights_sha256": {} if folder is None else folder.weights_sha256,
        "settings_sha256": {} if folder is None else hash_settings(folder.path),
        "version": __version__,
        "preprocessing": build_preprocessing_record(processor),
        "labels": labels | added,
        "problem_type": config.problem_type,
        "distance_threshold": config.distance_threshold if DISTANCE in names else None,
    }


def build_file_record(
    shape: GraphShape,
    file: Path,
    graph: OnnxGraph,
    comparisons: list[dict[str, Any]],
) -> dict[str, Any]:
    """Describe a graph and its file, in a folder that has no other files.

    Args:
        shape: The image sizes of the graph.
        file: The file.
        graph: Its contents.
        comparisons: The differences from the model, by shape of the images.
    """
    files = list(file.parent.iterdir())
    return {
        "file": file.name,
        # The size includes FILE.data, if there is one
        "num_bytes": sum(each.stat().st_size for each in files),
        "sha256": hash_files(files),
        "versions": get_versions("timm", *PACKAGES),
        # What the graph reads and returns
        "input": {
            "name": INPUT_NAME,
            "dtype": "float32",
            "shape": graph.session.get_inputs()[0].shape,
            "image_size": list(shape.image_size),
            "smallest_image_size": list(shape.smallest_size),
        },
        "fixed_because": shape.fixed_size_reason,
        # With the names of the dynamic axes, such as (height//16)
        "outputs": {output.name: output.shape for output in graph.session.get_outputs()},
        # How it compares with the model
        "largest_differences": {
            name: max(each["differences"][name] for each in comparisons)
            for name in comparisons[0]["differences"]
        },
        "tried": comparisons,
    }


def build_preprocessing_record(processor: ViTCLSImageProcessor) -> dict[str, Any]:
    """List what the image processor does to an image.

    Settings that are None are left out. Two steps have no setting: images are turned upright, and
    transparent ones are put on white.
    """
    names = (*SHARED_SETTINGS, "crop_rounding", "do_pad", "pad_size", "bit_depth")
    settings = {"orientation": "exif", "transparency": "white", **select_settings(processor, names)}
    if "resample" in settings:
        settings["resample"] = PILImageResampling(settings["resample"]).name.lower()
    return settings
