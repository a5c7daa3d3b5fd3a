"""Model and image processor for the labels of a dataset, and selection of the trained parameters.

Trained parameters by `--trainable`:

    full      all parameters
    head      classifiers, and a pooler with parameters; not the final norm (linear probing)
    last-N    the last N layers, the final norm and the head
    lora      low-rank updates of queries and values (Hu et al. 2021, arXiv 2106.09685), special tokens and the head

Parameters that are missing from the checkpoint are always trained, because they would otherwise stay random. An
example is a new distillation token with its position embedding and its gate. Parameters that are already frozen (the
mask token) stay frozen.
"""

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.image_utils import SizeDict

from ..blocks_vitcls import EncoderLayer, ViTCLSEmbeddings
from ..configuration_vitcls import ViTCLSConfig
from ..conversion.any_checkpoint import resolve_checkpoint
from ..data.labels import LabelSpace
from ..hub.adapters import LORA_TARGETS
from ..hub.loading import check_is_vitcls
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.load_model import CLASSIFIER_CLASSES, Classifier, is_preset, list_presets
from ..modeling_vitcls import ViTCLSModel
from ..options import ModelOptions
from .costs import get_first_trained_layer


ENCODER_PREFIX = "vitcls."
POOLER_PREFIX = "vitcls.pooler."
LORA_A_SUFFIX, LORA_B_SUFFIX = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class BuiltModel:
    """Model with its image processor, and the names of the parameters that were not loaded from a checkpoint."""

    model: Classifier
    processor: ViTCLSImageProcessor
    newly_initialized: set[str]


def build_model(options: ModelOptions, label_space: LabelSpace) -> BuiltModel:
    """Build a preset with random weights, or load a checkpoint. The checkpoint's classifier is kept only if it has the
    labels of `label_space`. Models for several tasks have one CLS token per task. Raise ValueError if options
    contradict each other, or the checkpoint is not a vitcls model, and OSError if it cannot be found or read."""
    values = options.get_config_values()
    if label_space.kind == "multi_task":
        values = {"num_cls_tokens": len(label_space.columns)} | values
    if is_preset(options.model):
        config = ViTCLSConfig.from_preset(options.model, **values, **label_space.to_config_values())
        model = CLASSIFIER_CLASSES[label_space.kind](config)
        processor = ViTCLSImageProcessor()
        newly_initialized = {name for name, _ in model.named_parameters()}
    else:
        folder = resolve_checkpoint(options.model)
        check_is_vitcls(options.model, folder)
        model, newly_initialized = load_for_labels(folder, values, label_space)
        processor = ViTCLSImageProcessor.from_pretrained(folder)
    if (mask_token := model.vitcls.embeddings.mask_token) is not None:
        mask_token.requires_grad_(False)  # unused in fine-tuning; DDP requires gradients of all trained parameters
    set_processor_size(processor, model.config)
    return BuiltModel(model, processor, newly_initialized)


def load_for_labels(source: str, values: dict[str, Any], label_space: LabelSpace) -> tuple[Classifier, set[str]]:
    """Load a checkpoint's encoder with a new classifier for these labels, or with the checkpoint's classifier if its
    labels are the same. Return the model, and the names of the new parameters."""
    stored_config = ViTCLSConfig.from_pretrained(source)
    model_class = CLASSIFIER_CLASSES[label_space.kind]
    if has_labels(stored_config, label_space) and model_class.__name__ in (stored_config.architectures or ()):
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
        for name, value in label_space.to_config_values().items():
            setattr(config, name, value)
        model = model_class(config)
        load_result = model.vitcls.load_state_dict(encoder.state_dict(), strict=label_space.kind != "multi_task")
        missing = {f"vitcls.{name}" for name in [*info["missing_keys"], *load_result.missing_keys]}
        newly_initialized = missing | {name for name, _ in model.named_parameters() if not name.startswith("vitcls.")}
    return model, newly_initialized | get_added_token_names(stored_config, model)


def has_labels(config: ViTCLSConfig, label_space: LabelSpace) -> bool:
    """Return whether a checkpoint's classifier has exactly these labels."""
    if label_space.kind == "multi_task":
        return config.task_labels() == label_space.columns
    has_kind = (config.problem_type or "single_label_classification") == label_space.kind
    return not config.tasks and has_kind and config.id2label == label_space.to_config_values()["id2label"]


def get_added_token_names(stored_config: ViTCLSConfig, model: Classifier) -> set[str]:
    """Return the names of the token parameters that contain more tokens than in the checkpoint."""
    groups = ("cls", "distillation", "registers")
    counts = zip(groups, stored_config.token_counts, model.config.token_counts, strict=True)
    grown_groups = [group for group, before, after in counts if after > before]
    tokens = model.vitcls.embeddings.get_special_tokens()
    return {
        name for name, parameter in model.named_parameters() for group in grown_groups if parameter is tokens[group]
    }


def check_preset(name: str) -> None:
    """Raise ValueError if a name looks like a preset, but is neither a preset nor a file or folder."""
    if name.startswith("vitcls-") and "/" not in name and not is_preset(name) and not Path(name).exists():
        raise ValueError(f"--model {name} is not a preset. Use one of {list_presets()}")


def set_processor_size(processor: Any, config: ViTCLSConfig) -> None:
    """Set the output size of an image processor to the model's image size if the sizes differ."""
    height, width = config.image_height_width
    output_size = processor.crop_size if processor.do_center_crop else processor.size
    if (output_size.height, output_size.width) != (height, width):
        processor.size = SizeDict(height=height, width=width)
        processor.do_center_crop = False


# Trained parameters -------------------------------------------------------------------------------------------------


def apply_trainable(
    model: Any, trainable: str, lora_rank: int = 8, newly_initialized: Collection[str] = frozenset()
) -> nn.Module:
    """Freeze the parameters that are not trained, in place. With "lora", add LoRA layers to the query and value
    projections. Return the model.

    `newly_initialized` are the names of the parameters that were not loaded from a checkpoint.

    Raises:
        ValueError: if N of "last-N" exceeds the number of layers, the value is unknown, or PEFT is missing for "lora".
    """
    if trainable == "full":
        return model
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    trained_names = {
        name for name in parameters if not name.startswith(ENCODER_PREFIX) or name.startswith(POOLER_PREFIX)
    }
    trained_names |= get_last_layer_names(model, trainable)
    tokens = model.vitcls.embeddings.get_special_tokens()
    token_names = {group: name for group, token in tokens.items() for name in parameters if parameters[name] is token}
    if trainable == "lora":
        trained_names.update(token_names.values())
    trained_names.update(newly_initialized)
    if new_groups := [group for group, name in token_names.items() if name in newly_initialized]:
        trained_names |= {f"{ENCODER_PREFIX}embeddings.position_embeddings.{group}" for group in new_groups}
        trained_names.add(f"{ENCODER_PREFIX}gates.gates")
    trained_names &= {name for name, parameter in parameters.items() if parameter.requires_grad}
    if trainable == "lora":
        add_lora(model, lora_rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained_names or ".lora_" in name)
    return model


def get_last_layer_names(model: Any, trainable: str) -> set[str]:
    """Return the names of the parameters that "last-N" adds to the head; empty for the other values."""
    if trainable in ("head", "lora"):
        return set()
    match = re.fullmatch(r"last-([1-9]\d*)", trainable)
    if match is None:
        raise ValueError(f"unknown --trainable {trainable!r}. Use full, head, lora, or last-N such as last-2")
    num_trained, num_layers = int(match[1]), len(model.vitcls.layers)
    if num_trained > num_layers:
        raise ValueError(
            f"--trainable is {trainable}, but the model has {num_layers} layers. Use a smaller N, or full"
        )
    prefixes = [f"{ENCODER_PREFIX}layers.{index}." for index in range(num_layers - num_trained, num_layers)]
    prefixes.append(f"{ENCODER_PREFIX}layernorm.")
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))}


def set_train_mode(model: nn.Module) -> None:
    """Set train mode, but keep frozen embeddings and layers in eval mode, so that their outputs are the same as in
    inference. Patch dropout is disabled if the embeddings and the first layer are frozen. Use this function instead
    of `model.train()`, also for wrapped models."""
    model.train()
    for module in model.modules():
        if isinstance(module, ViTCLSModel) and module.patch_dropout is not None:
            module.patch_dropout.train(uses_patch_dropout(module))
        if isinstance(module, ViTCLSEmbeddings | EncoderLayer):
            module.train(any(parameter.requires_grad for parameter in module.parameters()))


def uses_patch_dropout(encoder: ViTCLSModel) -> bool:
    """Return whether patches are dropped in training: the rate is positive, and the first layer or the embeddings are
    trained."""
    return encoder.config.patch_drop_rate > 0 and get_first_trained_layer(encoder) == 0


# LoRA ----------------------------------------------------------------------------------------------------------------


def add_lora(model: nn.Module, rank: int) -> None:
    """Replace the query and value projections by PEFT's layers with a scaling of 1: W x becomes W x + B A x."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--trainable lora requires PEFT: pip install peft") from error
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS), model)


def merge_lora(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merge LoRA weights into a state dict of full tensors, as W + B A; return a state dict without LoRA weights
    unchanged."""
    plain = {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}
    for name, lora_a in weights.items():
        if name.endswith(LORA_A_SUFFIX):
            layer = name.removesuffix(LORA_A_SUFFIX)
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + weights[f"{layer}{LORA_B_SUFFIX}"] @ lora_a
    return plain
