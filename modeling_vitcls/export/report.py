"""Describe a graph in its report: inputs, outputs, labels and preprocessing."""

from pathlib import Path
from typing import Any

from transformers.image_utils import PILImageResampling

from ..conversion.processors import SHARED_SETTINGS, select_settings
from ..data.labels import get_label_space
from ..hub.model_files import hash_files
from ..hub.model_folder import ModelFolder
from ..inference.onnx_graph import INPUT_NAME
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from .exportable import Outputs
from .tracing import GraphShape


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
