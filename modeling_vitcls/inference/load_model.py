"""Load a saved model for evaluation or prediction.

model, processor, batch_size = load_for_inference(folder, accelerator, use_head=True, ...)    in a command
model, processor = load_model(folder, use_head=None)                             anywhere else
"""

from collections.abc import Callable
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
from .exported_graphs import load_exported_model


# 8 images with 196 patches. Larger batches need more memory on a CPU and are not faster.
CPU_BATCH_TOKENS = 1600

Classifier = ViTCLSForImageClassification | ViTCLSForMultiTaskClassification
CLASSIFIER_CLASSES: dict[str, type[Classifier]] = {
    "single_label_classification": ViTCLSForImageClassification,
    "multi_label_classification": ViTCLSForImageClassification,
    "multi_task": ViTCLSForMultiTaskClassification,
}


def load_for_inference(
    folder: ModelFolder,
    accelerator: Accelerator,
    *,
    use_head: bool,
    resize: str | None,
    mixed_precision: str,
    batch_size: int | None,
    max_batch_size: int,
    print_line: Callable[[str], None],
    backend: str = "torch",
) -> tuple[Any, ViTCLSImageProcessor, int]:
    """Load a model on the device of the accelerator, in the precision that the user asked for.

    Args:
        folder: The model.
        accelerator: The accelerator, whose precision is set for `mixed_precision="auto"`.
        use_head: Whether to load the classifier.
        resize, backend: As in `load_model`.
        mixed_precision: The flag, also "auto".
        batch_size: Number of images of a process; None to choose it.
        max_batch_size: Default batch size on GPUs.
        print_line: Prints the precision if it was chosen.

    Returns:
        The model in evaluation mode, its image processor, and the number of images of a batch of
        one process.

    Raises:
        ValueError, OSError: As in `load_model`.
    """
    # ONNX files run in float32
    if mixed_precision == "auto" and not backend.endswith("onnx"):
        text = set_mixed_precision(accelerator, "auto", folder.config)
        if accelerator.mixed_precision != "no":
            print_line(f"mixed precision: {text}")

    model, processor = load_model(folder, use_head, resize, backend, accelerator.mixed_precision)
    batch_size = choose_batch_size(
        batch_size, model.config, processor, accelerator.device, max_batch_size
    )
    return model.to(accelerator.device).eval(), processor, batch_size


def load_model(
    folder: ModelFolder,
    use_head: bool | None,
    resize: str | None = None,
    backend: str = "torch",
    mixed_precision: str = "no",
) -> tuple[Any, ViTCLSImageProcessor]:
    """Load a model and its image processor for prediction.

    Args:
        folder: The model.
        use_head: Whether to load the classifier; None to load it if there is one.
        resize: How images become the input (crop, squash, pad). Default: unchanged.
        backend: "torch", "onnx", "openvino" or an exported file, which replaces the weights.
        mixed_precision: Precision of an exported file (exported_graphs.py).

    Raises:
        ValueError: If the model lacks weights, or has no classifier although one is requested, or
            if an exported file is not one of the model (exported_graphs.py).
        OSError: If the model cannot be read, or has no image processor.
    """
    config = folder.config
    architectures = config.architectures or []
    has_head = any(name.endswith("Classification") for name in architectures)
    use_head = has_head if use_head is None else use_head
    if use_head and architectures and not has_head:
        raise ValueError(
            f"labels require a classifier, but {folder.source} contains {architectures[0]}. "
            "Fine-tune the model first, or write features with `vitcls predict --features cls`"
        )
    processor = folder.load_processor()
    if resize is not None:
        set_resize(processor, resize, get_output_size(processor, config.image_height_width))
    if backend != "torch":
        graph = load_exported_model(backend, folder, processor, use_head, mixed_precision)
        return graph, processor

    graphs = [name for name, (file, _) in BACKEND_FILES.items() if (folder.path / file).is_file()]
    if graphs and not any(folder.path.glob("*.safetensors")):
        raise ValueError(
            f"{folder.source} has a graph, but no weights. Run `vitcls predict --backend "
            f"{graphs[0]}`, or set `model` to the model that was exported"
        )
    if not use_head:
        return folder.load(ViTCLSModel, add_pooling_layer=False), processor
    model_class: Any = (
        ViTCLSForMultiTaskClassification if config.tasks else ViTCLSForImageClassification
    )
    return folder.load(model_class), processor


def choose_batch_size(
    batch_size: int | None,
    config: ViTCLSConfig,
    processor: ViTCLSImageProcessor,
    device: torch.device,
    default: int,
) -> int:
    """Choose `batch_size` or, if it is None, `default`.

    On CPUs, the default is at most `CPU_BATCH_TOKENS` tokens of images of the size that the image
    processor makes.
    """
    if batch_size is not None or device.type != "cpu":
        return batch_size or default
    image_size = get_output_size(processor, config.image_height_width)
    num_tokens = config.token_layout.get_num_tokens(*config.get_grid_size(image_size))
    return max(1, min(default, CPU_BATCH_TOKENS // num_tokens))
