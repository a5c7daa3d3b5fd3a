"""Load a saved model for evaluation or prediction."""

from pathlib import Path
from typing import Any

from ..adaptation_vitcls import load_checkpoint
from ..configuration_vitcls import PRESETS, ViTCLSConfig
from ..conversion.any_checkpoint import resolve_checkpoint
from ..data.fit import set_fit
from ..hub.connection import silence_transformers
from ..hub.loading import MODEL_FILE_PATTERNS, check_is_vitcls
from ..hub.model_files import CONFIG_FILES
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from .exported_graphs import BACKEND_FILES, ExportedModel, find_exported_file


Classifier = ViTCLSForImageClassification | ViTCLSForMultiTaskClassification
CLASSIFIER_CLASSES: dict[str, type[Classifier]] = {
    "single_label_classification": ViTCLSForImageClassification,
    "multi_label_classification": ViTCLSForImageClassification,
    "multi_task": ViTCLSForMultiTaskClassification,
}


def is_preset(name: str) -> bool:
    """Return whether `name` is the name of a preset."""
    return name.removeprefix("vitcls-") in PRESETS


def format_preset_names() -> str:
    """Return all preset names that `--model` accepts, separated by commas."""
    return ", ".join(f"vitcls-{name}" for name in PRESETS)


def load_model(
    source: str, use_head: bool, fit: str | None = None, backend: str = "torch", mixed_precision: str = "no"
) -> tuple[Any, ViTCLSImageProcessor]:
    """Load a model and its image processor for prediction.

    Args:
        source: A folder, a Hub id or any other checkpoint that `--model` accepts.
        use_head: Whether to load the classifier.
        fit: Fit of the image processor. Default: unchanged.
        backend: "torch", "onnx", "openvino" or an exported file. An exported file replaces the weights.
        mixed_precision: Precision of an exported file (exported_graphs.py).

    Raises:
        ValueError: If the checkpoint is not a vitcls model, has no trained weights, or has no classifier although one
            is requested.
        OSError: If the checkpoint cannot be found or read.
    """
    if is_preset(source):
        raise ValueError(
            f"{source} is a preset without trained weights. Set --model to a folder or a model on the Hub"
        )
    check_is_finished(source)
    folder = resolve_checkpoint(source, list_file_patterns(backend))
    settings = check_is_vitcls(source, folder)
    model_class: Any = ViTCLSModel
    arguments = {"add_pooling_layer": False}
    if use_head:
        architectures = settings.get("architectures") or []
        if architectures and not any(name.endswith("Classification") for name in architectures):
            raise ValueError(
                f"label prediction requires a classifier, but {source} contains {architectures[0]}. Fine-tune the "
                "model first, or set --features"
            )
        model_class = ViTCLSForMultiTaskClassification if settings.get("tasks") else ViTCLSForImageClassification
        arguments = {}
    processor = load_processor(source, folder)
    if fit is not None:
        set_fit(processor, fit, ViTCLSConfig.from_pretrained(folder).image_height_width)
    if backend != "torch":
        return load_exported_model(folder, use_head, backend, mixed_precision), processor
    check_has_weights(source, folder)
    # Hide the warnings of transformers: missing weights raise ValueError, and an unused classifier is intended.
    with silence_transformers(hide_progress_bars=False):
        model, loading_info = model_class.from_pretrained(folder, output_loading_info=True, **arguments)
    if missing_weights := loading_info["missing_keys"]:
        weight_name = min(missing_weights)
        raise ValueError(f"the checkpoint {source} does not contain the weight {weight_name}. Train the model first")
    return model, processor


def list_file_patterns(backend: str) -> tuple[str, ...]:
    """Return the patterns of the model files that a backend reads."""
    return (*CONFIG_FILES, *BACKEND_FILES[backend]) if backend in BACKEND_FILES else MODEL_FILE_PATTERNS


def load_exported_model(folder: str, use_head: bool, backend: str, mixed_precision: str) -> ExportedModel:
    """Load an exported file with the configuration in a folder. Raise ValueError if the file cannot be read."""
    file = find_exported_file(backend, Path(folder))
    return ExportedModel(file, ViTCLSConfig.from_pretrained(folder), use_head, mixed_precision)


def check_has_weights(source: str, folder: str) -> None:
    """Raise ValueError if a folder contains an exported file instead of weights."""
    backends = [name for name, (file, _) in BACKEND_FILES.items() if Path(folder, file).is_file()]
    if backends and not any(Path(folder).glob("*.safetensors")):
        raise ValueError(f"--backend torch requires weights, but {source} has none. Set --backend {backends[0]}")


def load_processor(source: str, folder: str) -> ViTCLSImageProcessor:
    """Load the image processor from the folder of the model `source`. Raise OSError if the folder has no image
    processor."""
    if not Path(folder, "preprocessor_config.json").is_file():
        raise OSError(
            f"{source} requires an image processor, but preprocessor_config.json is missing. Convert the original "
            "checkpoint with `vitcls convert`, which also writes the image processor"
        )
    return load_checkpoint(ViTCLSImageProcessor.from_pretrained, folder)


def check_is_finished(source: str) -> None:
    """Raise ValueError if `source` is the output folder of a run that has not written its model."""
    folder = Path(source)
    if (folder / "checkpoints").is_dir() and not (folder / "config.json").exists():
        raise ValueError(
            f"{source} contains an unfinished run without a model. Repeat the training command with --resume"
        )


def load_classifier(source: str, folder: str, backend: str = "torch", mixed_precision: str = "no") -> Any:
    """Load a saved classifier of any kind from a folder. `source` is the name of the model in error messages, and the
    other arguments are those of `load_model`. Raise ValueError if the model is not a vitcls model, has no classifier,
    or was trained for regression."""
    check_is_vitcls(source, folder)
    config = ViTCLSConfig.from_pretrained(folder)
    class_by_name = {model_class.__name__: model_class for model_class in CLASSIFIER_CLASSES.values()}
    class_name = (config.architectures or ["a model of unknown class"])[0]
    if class_name not in class_by_name or not (config.tasks or config.num_labels):
        raise ValueError(
            f"evaluation requires a classifier, but {source} contains {class_name}. Fine-tune the model "
            "with `vitcls finetune`"
        )
    if config.problem_type == "regression":
        raise ValueError(
            f"evaluation requires a classifier, but {source} was trained for regression. Set --model to a classifier"
        )
    if backend != "torch":
        return load_exported_model(folder, True, backend, mixed_precision)
    check_has_weights(source, folder)
    return class_by_name[class_name].from_pretrained(folder)
