"""The model to train, and the image processor that goes with it, for a given set of labels."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import SizeDict

from ..configuration_vitcls import ViTCLSConfig
from ..data.labels import LabelSpace
from ..hub.loading import local_copy
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.load_model import CLASSES, Classifier, check_is_vitcls, is_preset, list_presets
from ..modeling_vitcls import ViTCLSModel
from ..options import ModelOptions


@dataclass(frozen=True)
class BuiltModel:
    """A model with its image processor, and the names of its parameters that no checkpoint filled."""

    model: Classifier
    processor: ViTCLSImageProcessor
    fresh: set[str]


def build_model(options: ModelOptions, label_space: LabelSpace) -> BuiltModel:
    """A preset with fresh weights, or a checkpoint; its classifier is kept only where it has these very labels.

    Several tasks get a CLS token each.

    Raises:
        ValueError: for values that contradict each other, or a checkpoint of another kind of model.
        OSError: for a checkpoint that cannot be found or read.
    """
    values = options.config_values()
    if label_space.kind == "multi_task":
        values = {"num_cls_tokens": len(label_space.columns)} | values
    if is_preset(options.model):
        config = ViTCLSConfig.from_preset(options.model, **values, **label_space.config_values())
        model = CLASSES[label_space.kind](config)
        processor = ViTCLSImageProcessor()
        fresh = {name for name, _ in model.named_parameters()}
    else:
        folder = local_copy(options.model)
        check_is_vitcls(options.model, folder)
        model, fresh = load_for_labels(folder, values, label_space)
        processor = ViTCLSImageProcessor.from_pretrained(folder)
    if (mask_token := model.vitcls.embeddings.mask_token) is not None:
        mask_token.requires_grad_(False)  # of masked pre-training; several processes wait for gradients of all others
    fit_processor(processor, model.config)
    return BuiltModel(model, processor, fresh)


def load_for_labels(source: str, values: dict[str, Any], label_space: LabelSpace) -> tuple[Classifier, set[str]]:
    """A checkpoint's encoder with a fresh classifier for these labels, or with its own where it has the same labels.

    Returns the model and the names of its fresh parameters.
    """
    stored = ViTCLSConfig.from_pretrained(source)
    model_class = CLASSES[label_space.kind]
    if has_labels(stored, label_space) and model_class.__name__ in (stored.architectures or ()):
        model, info = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **values)
        fresh = set(info["missing_keys"])
    else:
        encoder, info = ViTCLSModel.from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            tasks=None,  # the checkpoint's own, which may not fit the CLS tokens asked for
            **values,
        )
        config = copy.deepcopy(encoder.config)
        config.tasks = None
        for name, value in label_space.config_values().items():
            setattr(config, name, value)
        model = model_class(config)
        load = model.vitcls.load_state_dict(encoder.state_dict(), strict=label_space.kind != "multi_task")
        missing = {f"vitcls.{name}" for name in [*info["missing_keys"], *load.missing_keys]}
        fresh = missing | {name for name, _ in model.named_parameters() if not name.startswith("vitcls.")}
    return model, fresh | added_tokens(stored, model)


def has_labels(config: ViTCLSConfig, label_space: LabelSpace) -> bool:
    """Whether a checkpoint's classifier answers with these very labels."""
    if label_space.kind == "multi_task":
        return config.task_labels() == label_space.columns
    has_kind = (config.problem_type or "single_label_classification") == label_space.kind
    return not config.tasks and has_kind and config.id2label == label_space.config_values()["id2label"]


def added_tokens(stored: ViTCLSConfig, model: Classifier) -> set[str]:
    """Names of the token parameters of which the model has more than its checkpoint."""
    counts = zip(("cls", "distillation", "registers"), stored.token_counts, model.config.token_counts, strict=True)
    grown = [group for group, before, after in counts if after > before]
    tokens = model.vitcls.embeddings.get_special_tokens()
    return {name for name, parameter in model.named_parameters() for group in grown if parameter is tokens[group]}


def check_preset(name: str) -> None:
    """Raise ValueError if a name looks like a preset, but is neither a preset nor a file or folder."""
    if name.startswith("vitcls-") and "/" not in name and not is_preset(name) and not Path(name).exists():
        raise ValueError(f"--model {name} is not a preset: choose one of {list_presets()}")


def fit_processor(processor: Any, config: ViTCLSConfig) -> None:
    """Make an image processor produce images of the size that the model was built for, where it does not yet."""
    height, width = config.image_height_width
    output = processor.crop_size if processor.do_center_crop else processor.size
    if (output.height, output.width) != (height, width):
        processor.size = SizeDict(height=height, width=width)
        processor.do_center_crop = False
