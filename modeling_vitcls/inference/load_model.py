"""Load a saved model for evaluation or prediction."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..conversion.any_checkpoint import resolve_checkpoint
from ..data.aspect_ratio import get_output_size, set_fit
from ..hub.connection import silence_transformers
from ..hub.loading import MODEL_FILE_PATTERNS, check_is_vitcls
from ..hub.model_files import CONFIG_FILES, RESULTS_FILE
from ..model.adaptation_vitcls import load_checkpoint
from ..model.configuration_vitcls import PRESETS, ViTCLSConfig
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from ..runtime.distributed import set_mixed_precision
from .exported_graphs import BACKEND_FILES, load_exported_model


TORCH = "torch"
CPU_BATCH_TOKENS = (
    1600  # 8 images with 196 patches; larger batches need more memory and are not faster
)

Classifier = ViTCLSForImageClassification | ViTCLSForMultiTaskClassification
CLASSIFIER_CLASSES: dict[str, type[Classifier]] = {
    "single_label_classification": ViTCLSForImageClassification,
    "multi_label_classification": ViTCLSForImageClassification,
    "multi_task": ViTCLSForMultiTaskClassification,
}


def is_preset(name: str) -> bool:
    """Return whether `name` is the name of a preset."""
    return name.removeprefix("vitcls-") in PRESETS


def load_model(
    source: str,
    use_head: bool | None,
    fit: str | None = None,
    backend: str = "torch",
    mixed_precision: str = "no",
) -> tuple[Any, ViTCLSImageProcessor]:
    """Load a model and its image processor for prediction.

    Args:
        source: A folder, a Hub id or any other checkpoint that `--model` accepts.
        use_head: Whether to load the classifier; None to load it if there is one.
        fit: Fit of the image processor. Default: unchanged.
        backend: "torch", "onnx", "openvino" or an exported file, which replaces the weights. "auto" is "torch" unless
            the folder only has graphs.
        mixed_precision: Precision of an exported file (exported_graphs.py).

    Raises:
        ValueError: If the checkpoint is not a vitcls model, has no trained weights, or has no classifier although one
            is requested, or if an exported file is not one of the model (exported_graphs.py).
        OSError: If the checkpoint cannot be found or read.
    """
    folder = find_model_folder(source, backend)
    settings = check_is_vitcls(source, folder)
    model_class: Any = ViTCLSModel
    arguments = {"add_pooling_layer": False}
    architectures = settings.get("architectures") or []
    has_head = any(name.endswith("Classification") for name in architectures)
    use_head = has_head if use_head is None else use_head
    if use_head:
        if architectures and not has_head:
            raise ValueError(
                f"labels require a classifier, but {source} contains {architectures[0]}. Fine-tune the model first, "
                "or set --features in `vitcls predict`"
            )
        model_class = (
            ViTCLSForMultiTaskClassification
            if settings.get("tasks")
            else ViTCLSForImageClassification
        )
        arguments = {}
    processor = load_processor(source, folder)
    config = ViTCLSConfig.from_pretrained(folder)
    if fit is not None:
        set_fit(processor, fit, get_output_size(processor, config.image_height_width))
    backends = [name for name, (file, _) in BACKEND_FILES.items() if Path(folder, file).is_file()]
    has_only_graphs = bool(backends) and not any(Path(folder).glob("*.safetensors"))
    if backend == "auto":
        backend = backends[-1] if has_only_graphs else TORCH
    if backend != TORCH:
        graph = load_exported_model(
            backend=backend,
            folder=Path(folder),
            config=config,
            processor=processor,
            use_head=use_head,
            mixed_precision=mixed_precision,
        )
        return graph, processor
    if has_only_graphs:
        raise ValueError(
            f"--backend torch requires weights, but {source} has none. Set --backend {backends[0]}"
        )
    # Hide the warnings of transformers: missing weights raise ValueError, and an unused classifier is intended.
    with silence_transformers():
        model, loading_info = model_class.from_pretrained(
            folder, output_loading_info=True, **arguments
        )
    if missing_weights := loading_info["missing_keys"]:
        weight_name = min(missing_weights)
        raise ValueError(
            f"the checkpoint {source} does not contain the weight {weight_name}. Train the model first"
        )
    return model, processor


def find_model_folder(source: str, backend: str = "torch") -> str:
    """Return the local folder of a model, with the files that a backend reads. The errors are as in `load_model`."""
    if is_preset(source):
        raise ValueError(
            f"{source} is a preset without trained weights. Set --model to a folder or a model on the Hub"
        )
    if Path(source, "checkpoints").is_dir() and not Path(source, "config.json").exists():
        raise ValueError(
            f"{source} contains an unfinished run without a model. Repeat the training command with --resume"
        )
    return resolve_checkpoint(source, list_file_patterns(backend))


def announce_precision(accelerator: Accelerator, setting: str, source: str, backend: str) -> str:
    """Set the precision for `--mixed-precision auto` before a model is loaded, and return a line for the user, or an
    empty text if no choice was made. ONNX files run in float32."""
    folder = find_model_folder(source, backend)
    check_is_vitcls(source, folder)
    if setting != "auto" or backend.endswith("onnx"):
        return ""
    text = set_mixed_precision(accelerator, setting, ViTCLSConfig.from_pretrained(folder))
    return f"mixed precision: {text}" if accelerator.mixed_precision != "no" else ""


def choose_batch_size(
    batch_size: int | None, config: ViTCLSConfig, device: torch.device, default: int
) -> int:
    """Return `batch_size` or, if it is None, `default`. On CPUs, the default is at most `CPU_BATCH_TOKENS` tokens."""
    if batch_size is not None or device.type != "cpu":
        return batch_size or default
    num_tokens = config.token_layout.get_num_tokens(*config.grid_size)
    return max(1, min(default, CPU_BATCH_TOKENS // num_tokens))


def check_is_classifier(config: ViTCLSConfig) -> None:
    """Raise ValueError for a model without classes, or for regression."""
    if not config.tasks and (not config.num_labels or config.problem_type == "regression"):
        problem = "was trained for regression" if config.num_labels else "has no classifier"
        raise ValueError(
            f"labels require a classifier, but the model {problem}. Fine-tune a classifier, or set --features in "
            "`vitcls predict`"
        )


def list_file_patterns(backend: str) -> tuple[str, ...]:
    """Return the patterns of the model files that a backend reads, and results.json."""
    if backend not in BACKEND_FILES:
        return (*MODEL_FILE_PATTERNS, RESULTS_FILE)
    graph_files = BACKEND_FILES[backend]
    return (*CONFIG_FILES, *graph_files, f"{graph_files[0]}.json", RESULTS_FILE)


def load_processor(source: str, folder: str) -> ViTCLSImageProcessor:
    """Load the image processor from the folder of the model `source`. Raise OSError if the folder has no image
    processor."""
    if not Path(folder, "preprocessor_config.json").is_file():
        raise OSError(
            f"{source} requires an image processor, but preprocessor_config.json is missing. Convert the original "
            "checkpoint with `vitcls convert`, which also writes the image processor"
        )
    return load_checkpoint(ViTCLSImageProcessor.from_pretrained, folder)
