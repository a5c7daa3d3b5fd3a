"""Construction of the model to train and its image processor, for a given set of labels."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import SizeDict

from ..configuration_vitcls import ViTCLSConfig
from ..data.labels import LabelSpace
from ..hub.loading import get_model_folder
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.load_model import CLASSES, Classifier, check_is_vitcls, is_preset, list_presets
from ..modeling_vitcls import ViTCLSModel
from ..options import ModelOptions


@dataclass(frozen=True)
class BuiltModel:
    """Model with its image processor, and the names of the parameters that were not loaded from a checkpoint."""

    model: Classifier
    processor: ViTCLSImageProcessor
    newly_initialized: set[str]


def build_model(options: ModelOptions, label_space: LabelSpace) -> BuiltModel:
    """Build a preset with random weights, or load a checkpoint. The checkpoint's classifier is kept only if its labels
    are the same.

    Models for several tasks have one CLS token per task.

    Raises:
        ValueError: if values contradict each other, or the checkpoint is another kind of model.
        OSError: if the checkpoint cannot be found or read.
    """
    values = options.config_values()
    if label_space.kind == "multi_task":
        values = {"num_cls_tokens": len(label_space.columns)} | values
    if is_preset(options.model):
        config = ViTCLSConfig.from_preset(options.model, **values, **label_space.config_values())
        model = CLASSES[label_space.kind](config)
        processor = ViTCLSImageProcessor()
        newly_initialized = {name for name, _ in model.named_parameters()}
    else:
        folder = get_model_folder(options.model)
        check_is_vitcls(options.model, folder)
        model, newly_initialized = load_for_labels(folder, values, label_space)
        processor = ViTCLSImageProcessor.from_pretrained(folder)
    if (mask_token := model.vitcls.embeddings.mask_token) is not None:
        mask_token.requires_grad_(False)  # unused in fine-tuning; DDP requires gradients of all trained parameters
    fit_processor(processor, model.config)
    return BuiltModel(model, processor, newly_initialized)


def load_for_labels(source: str, values: dict[str, Any], label_space: LabelSpace) -> tuple[Classifier, set[str]]:
    """Load a checkpoint's encoder with a new classifier for these labels, or with its own classifier if its labels are
    the same.

    Returns:
        The model, and the names of its new parameters.
    """
    stored = ViTCLSConfig.from_pretrained(source)
    model_class = CLASSES[label_space.kind]
    if has_labels(stored, label_space) and model_class.__name__ in (stored.architectures or ()):
        model, info = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **values)
        newly_initialized = set(info["missing_keys"])
    else:
        encoder, info = ViTCLSModel.from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            tasks=None,  # the checkpoint's tasks may not match the number of CLS tokens
            **values,
        )
        config = copy.deepcopy(encoder.config)
        config.tasks = None
        for name, value in label_space.config_values().items():
            setattr(config, name, value)
        model = model_class(config)
        load = model.vitcls.load_state_dict(encoder.state_dict(), strict=label_space.kind != "multi_task")
        missing = {f"vitcls.{name}" for name in [*info["missing_keys"], *load.missing_keys]}
        newly_initialized = missing | {name for name, _ in model.named_parameters() if not name.startswith("vitcls.")}
    return model, newly_initialized | get_added_token_names(stored, model)


def has_labels(config: ViTCLSConfig, label_space: LabelSpace) -> bool:
    """Return whether a checkpoint's classifier has exactly these labels."""
    if label_space.kind == "multi_task":
        return config.task_labels() == label_space.columns
    has_kind = (config.problem_type or "single_label_classification") == label_space.kind
    return not config.tasks and has_kind and config.id2label == label_space.config_values()["id2label"]


def get_added_token_names(stored: ViTCLSConfig, model: Classifier) -> set[str]:
    """Return the names of the token parameters that have more tokens than in the checkpoint."""
    counts = zip(("cls", "distillation", "registers"), stored.token_counts, model.config.token_counts, strict=True)
    grown = [group for group, before, after in counts if after > before]
    tokens = model.vitcls.embeddings.get_special_tokens()
    return {name for name, parameter in model.named_parameters() for group in grown if parameter is tokens[group]}


def check_preset(name: str) -> None:
    """Raise ValueError if a name looks like a preset, but is neither a preset nor a file or folder."""
    if name.startswith("vitcls-") and "/" not in name and not is_preset(name) and not Path(name).exists():
        raise ValueError(f"--model {name} is not a preset. Use one of {list_presets()}")


def fit_processor(processor: Any, config: ViTCLSConfig) -> None:
    """Set the output size of an image processor to the model's image size if it differs."""
    height, width = config.image_height_width
    output = processor.crop_size if processor.do_center_crop else processor.size
    if (output.height, output.width) != (height, width):
        processor.size = SizeDict(height=height, width=width)
        processor.do_center_crop = False
