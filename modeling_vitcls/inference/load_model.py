"""Load a saved model for evaluation or prediction.

loaded = load_for_inference(folder, options, accelerator, use_head=True, ...)    in a command
model, processor = load_model(folder, use_head=None)                             anywhere else
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..data.aspect_ratio import get_output_size, set_resize
from ..hub.model_files import BACKEND_FILES
from ..hub.model_folder import ModelFolder
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from ..runtime.distributed import set_mixed_precision
from ..runtime.messages import format_message
from .exported_graphs import find_graph, load_exported_model
from .options import EvaluateOptions, PredictOptions


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


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device and in evaluation mode, and how images pass through it."""

    folder: ModelFolder
    model: Any
    processor: ViTCLSImageProcessor
    batch_size: int  # of a process

    @property
    def config(self) -> ViTCLSConfig:
        config: ViTCLSConfig = self.model.config
        return config


def load_for_inference(
    folder: ModelFolder,
    options: EvaluateOptions | PredictOptions,
    accelerator: Accelerator,
    *,
    use_head: bool,
    max_batch_size: int,
    print_line: Callable[[str], None],
) -> LoadedModel:
    """Load a model on the device of the accelerator, in the precision of the options.

    Args:
        folder: The model.
        options: The resizing, the backend, the precision and the batch size.
        accelerator: The accelerator, whose precision is set for `mixed_precision="auto"`.
        use_head: Whether to load the classifier.
        max_batch_size: Default batch size on GPUs.
        print_line: Prints the precision if it was chosen.

    Raises:
        ValueError, OSError: As in `load_model`.
    """
    # ONNX files run in float32
    if options.mixed_precision == "auto" and not options.backend.endswith("onnx"):
        text = set_mixed_precision(accelerator, "auto", folder.config)
        if accelerator.mixed_precision != "no":
            print_line(f"mixed precision: {format_message(text)}")

    backend = options.backend
    if backend == "auto" and accelerator.device.type != "cpu" and folder.has_weights:
        backend = TORCH  # graphs are computed on CPUs
    model, processor = load_model(
        folder, use_head, options.resize, backend, accelerator.mixed_precision, print_line
    )
    batch_size = choose_batch_size(
        options.batch_size, model.config, processor, accelerator.device, max_batch_size
    )
    return LoadedModel(folder, model.to(accelerator.device).eval(), processor, batch_size)


def load_model(
    folder: ModelFolder,
    use_head: bool | None,
    resize: str | None = None,
    backend: str = "torch",
    mixed_precision: str = "no",
    print_line: Callable[[str], None] = print,
) -> tuple[Any, ViTCLSImageProcessor]:
    """Load a model and its image processor for prediction.

    Args:
        folder: The model.
        use_head: Whether to load the classifier; None to load it if there is one.
        resize: How images become the input (crop, squash, pad). Default: unchanged.
        backend: "torch", "onnx", "openvino" or an exported file, which replaces the weights. "auto"
            is a classifier's graph in the folder that fits (exported_graphs.py), or else "torch".
        mixed_precision: Precision of an exported file (exported_graphs.py).
        print_line: Prints which graph "auto" runs.

    Raises:
        ValueError: If the model lacks weights, or has no classifier although one is requested, or
            if an exported file is not one of the model (exported_graphs.py).
        OSError: If the model cannot be read, or has no image processor.
    """
    config = folder.config
    model_class: Any = ViTCLSModel
    arguments = {"add_pooling_layer": False}
    architectures = config.architectures or []
    has_head = any(name.endswith("Classification") for name in architectures)
    use_head = has_head if use_head is None else use_head
    if use_head:
        if architectures and not has_head:
            raise ValueError(
                f"labels require a classifier, but {folder.source} contains {architectures[0]}. "
                "Fine-tune the model first, or write features with `vitcls predict --features cls`"
            )
        model_class = (
            ViTCLSForMultiTaskClassification if config.tasks else ViTCLSForImageClassification
        )
        arguments = {}
    processor = folder.load_processor()
    if resize is not None:
        set_resize(processor, resize, get_output_size(processor, config.image_height_width))
    backends = [name for name, (file, _) in BACKEND_FILES.items() if (folder.path / file).is_file()]
    has_only_graphs = bool(backends) and not any(folder.path.glob("*.safetensors"))
    if backend == "auto" and has_only_graphs:
        backend = backends[-1]
    if backend == "auto":
        graph = find_graph(folder, processor, mixed_precision, print_line) if use_head else None
        if graph is not None:
            return graph, processor
        backend = TORCH
    if backend != TORCH:
        graph = load_exported_model(
            backend=backend,
            folder=folder,
            processor=processor,
            use_head=use_head,
            mixed_precision=mixed_precision,
        )
        return graph, processor
    if has_only_graphs:
        raise ValueError(
            f"`backend='torch'` requires weights, but {folder.source} has none. Set "
            f"`backend={backends[0]!r}`"
        )
    return folder.load(model_class, **arguments), processor


def choose_batch_size(
    batch_size: int | None,
    config: ViTCLSConfig,
    processor: ViTCLSImageProcessor,
    device: torch.device,
    default: int,
) -> int:
    """Return `batch_size` or, if it is None, `default`.

    On CPUs, the default is at most `CPU_BATCH_TOKENS` tokens of images of the size that the image
    processor makes.
    """
    if batch_size is not None or device.type != "cpu":
        return batch_size or default
    image_size = get_output_size(processor, config.image_height_width)
    num_tokens = config.token_layout.get_num_tokens(*config.get_grid_size(image_size))
    return max(1, min(default, CPU_BATCH_TOKENS // num_tokens))


def check_is_classifier(config: ViTCLSConfig) -> None:
    """Raise ValueError for a model without classes, or for regression."""
    if not config.tasks and (not config.num_labels or config.problem_type == "regression"):
        problem = "was trained for regression" if config.num_labels else "has no classifier"
        raise ValueError(
            f"labels require a classifier, but the model {problem}. Fine-tune a classifier, or "
            "write features with `vitcls predict --features cls`"
        )
