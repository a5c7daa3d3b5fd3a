"""The report of an exported file, FILE.json (docs/exporting.md)."""

from pathlib import Path
from typing import Any

from transformers.image_utils import PILImageResampling

from ..conversion.processors import SHARED_SETTINGS, select_settings
from ..data.labels import get_label_space
from ..hub.model_files import hash_files, hash_settings
from ..inference.prediction_rows import DISTANCE
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..runtime.system import get_versions
from ..version import __version__
from .exportable import Exportable, Outputs
from .onnx_file import OnnxGraph
from .tracing import INPUT_NAME, GraphShape


PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def build_model_record(exportable: Exportable, names: list[str]) -> dict[str, Any]:
    """Describe a model for a program that has its graph alone: preprocessing, labels, threshold.

    `names` are the outputs of the graph.
    """
    model, processor, folder = exportable
    threshold = model.config.distance_threshold if DISTANCE in names else None
    return {
        "model_class": type(model).__name__,
        "weights_sha256": {} if folder is None else folder.weights_sha256,
        "settings_sha256": {} if folder is None else hash_settings(folder.path),
        "version": __version__,
        "preprocessing": build_preprocessing_record(processor),
        "labels": get_label_names(model.config, names),
        "problem_type": model.config.problem_type,
        "distance_threshold": threshold,
    }


def build_file_record(
    shape: GraphShape,
    file: Path,
    graph: OnnxGraph,
    outputs: Outputs,
    comparisons: list[dict[str, Any]],
) -> dict[str, Any]:
    """Describe a graph and its file, in a folder that has no other files.

    Args:
        shape: The image sizes of the graph.
        file: The file.
        graph: Its contents.
        outputs: The outputs of the model for some images.
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
            name: max(each["differences"][name] for each in comparisons) for name in outputs
        },
        "tried": comparisons,
    }


def build_preprocessing_record(processor: ViTCLSImageProcessor | None) -> dict[str, Any] | None:
    """List what the image processor does to an image; None without a processor.

    Settings that are None are left out. Two steps have no setting: images are turned upright, and
    transparent ones are put on white.
    """
    if processor is None:
        return None
    names = (*SHARED_SETTINGS, "crop_rounding", "do_pad", "pad_size", "bit_depth")
    settings = {"orientation": "exif", "transparency": "white", **select_settings(processor, names)}
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
