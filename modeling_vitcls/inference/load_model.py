"""Load a saved model for evaluation or prediction.

loaded = load_for_inference(folder, device, use_head=True, ...)     model, processor, batch_size
model = load_model(folder)
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..data.aspect_ratio import get_output_size, set_resize
from ..hub.model_folder import ModelFolder
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from ..runtime.system import has_bfloat16
from ..speed.packed import pack


# 8 images with 196 patches. Larger batches need more memory on a CPU and are not faster.
CPU_BATCH_TOKENS = 1600

Classifier = ViTCLSForImageClassification | ViTCLSForMultiTaskClassification
CLASSIFIER_CLASSES: dict[str, type[Classifier]] = {
    "single_label_classification": ViTCLSForImageClassification,
    "multi_label_classification": ViTCLSForImageClassification,
    "multi_task": ViTCLSForMultiTaskClassification,
}


@dataclass(frozen=True)
class LoadedModel:
    """A packed model in evaluation mode, its image processor, and the images of a batch of one process."""

    model: Any
    processor: ViTCLSImageProcessor
    batch_size: int


def load_for_inference(
    folder: ModelFolder,
    device: torch.device | None,
    *,
    use_head: bool | None,
    batch_size: int | None,
    max_batch_size: int,
    resize: str | None = None,
) -> LoadedModel:
    """Load a model on a device, with its image processor.

    Args:
        folder: The model.
        device, use_head: As in `load_model`.
        batch_size: Number of images of a process; None to choose it: `max_batch_size` but, on CPUs, at
            most `CPU_BATCH_TOKENS` tokens.
        max_batch_size: Default batch size on GPUs.
        resize: How images become the input (crop, squash, pad). Default: unchanged.

    Raises:
        ValueError: As in `load_model`, or if there is no classifier although one is requested.
        OSError: If the model cannot be read.
    """
    config = folder.config
    if use_head and config.architectures and not has_classifier(config):
        raise ValueError(
            f"labels require a classifier, but {folder.source} contains {config.architectures[0]}. "
            "Fine-tune the model first, or write features with `vitcls predict --features cls`"
        )
    model = load_model(folder, use_head, device)
    processor = folder.load_processor()
    image_size = get_output_size(processor, config.image_height_width)
    if resize is not None:
        set_resize(processor, resize, image_size)
    if batch_size is None:
        batch_size = max_batch_size
        if model.device.type == "cpu":
            num_tokens = config.token_layout.get_num_tokens(*config.get_grid_size(image_size))
            batch_size = max(1, min(batch_size, CPU_BATCH_TOKENS // num_tokens))
    return LoadedModel(model, processor, batch_size)


def has_classifier(config: ViTCLSConfig) -> bool:
    """Check whether the saved model is a classifier."""
    return any(name.endswith("Classification") for name in config.architectures or [])


def load_model(
    folder: ModelFolder, use_head: bool | None = None, device: torch.device | None = None
) -> Any:
    """Load a packed model, which is only read.

    Args:
        folder: The model.
        use_head: Whether to load the classifier. Default: if there is one.
        device: The device. Default: the GPU, if there is one.

    Raises:
        ValueError: If the model lacks weights.
        OSError: If the model cannot be read.
    """
    config = folder.config
    if not (has_classifier(config) if use_head is None else use_head):
        model = folder.load(ViTCLSModel, add_pooling_layer=False)
    elif config.tasks:
        model = folder.load(ViTCLSForMultiTaskClassification)
    else:
        model = folder.load(ViTCLSForImageClassification)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not has_bfloat16(device):
        model.float()  # Half precision would take several times as long
    return pack(model.to(device))
