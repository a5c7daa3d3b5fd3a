"""The model and the image processor for the labels of a dataset, and what is trained.

The flag `--trainable` selects the trainable parameters:

    full      all parameters
    head      classifiers, and the pooler if it has parameters, but not the final norm (linear probing)
    last-N    the last N layers, the final norm and the head
    tokens    new special tokens, or all special tokens if none is new, and the head (prompt tuning, arXiv
              2203.12119)
    lora      special tokens, the head, and low-rank updates of the query and value projections (arXiv 2106.09685)

Parameters that are missing from the checkpoint are always trained, because their initial values are
random. For example, a new distillation token is trained with its position embedding.
The mask token is already frozen and remains frozen.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..conversion.open_model import is_preset, open_model
from ..data.aspect_ratio import get_resize, set_resize
from ..data.cells import normalize_name
from ..data.labels import LabelSpace, get_label_space
from ..hub.model_folder import ModelFolder, build_processor
from ..inference.load_model import CLASSIFIER_CLASSES, Classifier
from ..model.adaptation_vitcls import can_copy_classifier
from ..model.blocks_vitcls import ViTCLSEmbeddings, ViTCLSLayer
from ..model.configuration_vitcls import PRESETS, ViTCLSConfig
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import ViTCLSModel
from ..model.token_layout_vitcls import COUNT_FIELDS


# The rank at which LoRA's results hardly change any more (Hu et al. 2021, arXiv 2106.09685, table 6)
LORA_RANK = 8
# The query and value projections of the paper; the pattern excludes attention poolers
LORA_TARGET_MODULES = r".*\.layers\.\d+\.attention\.[qv]_proj"
# Fields of the configuration that follow from the labels of the dataset
LABEL_FIELDS = ("num_labels", "id2label", "label2id", "problem_type", "tasks", "extra_heads")
LORA_A_SUFFIX = ".lora_A.default.weight"
LORA_B_SUFFIX = ".lora_B.default.weight"


@dataclass(frozen=True)
class InitialModel:
    """The model from which a run starts: a preset, or the folder of a checkpoint."""

    name: str
    folder: ModelFolder | None  # None for a preset
    config: ViTCLSConfig

    @property
    def has_random_weights(self) -> bool:
        """Return whether the model is a preset."""
        return self.folder is None


def resolve_initial_model(name: str) -> InitialModel:
    """Find the initial model that `name` names.

    Checkpoints are downloaded or converted if necessary. Raise ValueError if the checkpoint is not
    a vitcls model, and OSError if it cannot be found or read.
    """
    if not is_preset(name):
        folder = open_model(name)
        return InitialModel(name, folder, folder.config)
    return InitialModel(name, None, ViTCLSConfig.from_preset(name))


def build_model(
    initial: InitialModel,
    label_space: LabelSpace,
    config_values: dict[str, Any],
    resize: str | None = None,
    bit_depth: int | None = None,
) -> tuple[Classifier, ViTCLSImageProcessor, set[str]]:
    """Build a preset with random weights, or load a checkpoint.

    Return the model, the image processor, and the names of the parameters that are not loaded from
    a checkpoint. A classifier in the checkpoint is kept only if it has the labels of `label_space`,
    and the same layers and size of input. Multi-task models have one CLS token per task; new ones
    start with the same output as the checkpoint's. The other arguments replace stored values of the
    configuration and of the image processor.
    """
    if label_space.kind == "multi_task":
        config_values = {"num_cls_tokens": len(label_space.columns)} | config_values
        # New tokens of a mean are twins of the others.
        config_values |= {"cls_pooling": "mean"}

    if initial.folder is None:
        config = ViTCLSConfig.from_preset(
            initial.name, **config_values, **label_space.to_config_values()
        )
        model = CLASSIFIER_CLASSES[label_space.kind](config)
        processor = build_processor(config)
        new_parameter_names = {name for name, _ in model.named_parameters()}
    else:
        model, new_parameter_names = load_with_label_space(initial, config_values, label_space)
        processor = initial.folder.load_processor()

    mask_token = model.vitcls.embeddings.mask_token
    if mask_token is not None:
        # No run uses it, and DDP requires gradients of all trainable parameters
        mask_token.requires_grad_(False)
    set_resize(processor, resize or get_resize(processor), model.config.image_height_width)
    processor.bit_depth = bit_depth or processor.bit_depth
    return model, processor, new_parameter_names


def load_with_label_space(
    initial: InitialModel, config_values: dict[str, Any], label_space: LabelSpace
) -> tuple[Classifier, set[str]]:
    """Load a checkpoint as a model for the labels in `label_space`.

    The classifier is new, unless the checkpoint has one with the same labels and the same input.
    Return the model, and the names of the newly initialized parameters.
    """
    assert initial.folder is not None, "a preset has no checkpoint to load"
    stored_config = initial.config
    model_class = CLASSIFIER_CLASSES[label_space.kind]
    # They were fitted to features that fine-tuning changes
    fitted = dict.fromkeys(("extra_heads", "class_statistics", "distance_threshold"))
    config_values = config_values | fitted

    has_same_class = model_class.__name__ in (stored_config.architectures or ())
    has_classifier = has_same_class and has_labels(stored_config, label_space)
    if has_classifier and has_same_input(stored_config, config_values):
        model, new_parameter_names = initial.folder.load_partly(
            model_class,
            dtype=torch.float32,
            **config_values,
        )
    else:
        encoder, missing_weights = initial.folder.load_partly(
            ViTCLSModel,
            dtype=torch.float32,
            tasks=None,  # They belong to the old labels, and may not match the number of CLS tokens
            **config_values,
        )

        config = encoder.config
        for name, value in label_space.to_config_values().items():
            setattr(config, name, value)
        model = model_class(config)
        load_result = model.vitcls.load_state_dict(
            encoder.state_dict(), strict=label_space.kind != "multi_task"
        )

        missing_names = {f"vitcls.{name}" for name in [*missing_weights, *load_result.missing_keys]}
        head_names = {
            name for name, _ in model.named_parameters() if not name.startswith("vitcls.")
        }
        new_parameter_names = missing_names | head_names

    token_names = list_token_parameters(model)
    new_parameter_names |= {token_names[group] for group in find_grown_groups(stored_config, model)}
    has_new_head = model.config.has_distillation_head and not stored_config.has_distillation_head
    if has_new_head and not can_copy_classifier(stored_config):
        names = (name for name, _ in model.named_parameters())
        new_parameter_names |= {name for name in names if name.startswith("distillation_cl")}
    return model, new_parameter_names


def has_labels(config: ViTCLSConfig, label_space: LabelSpace) -> bool:
    """Tell whether a checkpoint's classifier can be kept: it has exactly these labels."""
    stored, wanted = (
        (
            space.kind,
            [*space.tasks],
            [list(map(normalize_name, each)) for each in space.columns.values()],
        )
        for space in (get_label_space(config), label_space)
    )
    return stored == wanted


def has_same_input(config: ViTCLSConfig, config_values: Mapping[str, Any]) -> bool:
    """Tell whether a classifier was fitted to these values: the same pooling of the same layers."""
    layers = config_values.get("pooled_layers", config.pooled_layers)
    is_same_pooling = config_values.get("pooling", config.pooling) == config.pooling
    return is_same_pooling and config.resolve_layers(layers) == config.resolve_layers(
        config.pooled_layers
    )


def find_grown_groups(stored_config: ViTCLSConfig, model: Any) -> dict[str, list[bool]]:
    """Find the groups with more tokens than in the checkpoint, and tell which of their tokens are new."""
    sizes = zip(COUNT_FIELDS, stored_config.token_counts, model.config.token_counts, strict=True)
    return {group: [index >= old for index in range(new)] for group, old, new in sizes if new > old}


def list_last_layers(model: Any) -> list[nn.Linear]:
    """List the last layer of each head of a classifier. A head may be an MLP."""
    heads = [each for each in (model.classifier, model.distillation_classifier) if each is not None]
    return [[each for each in head.modules() if isinstance(each, nn.Linear)][-1] for head in heads]


def list_token_parameters(model: Any) -> dict[str, str]:
    """Name the parameter of the special tokens of each group."""
    tokens = model.vitcls.embeddings.get_special_tokens()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group: names[id(token)] for group, token in tokens.items()}


def check_model_flags(
    model: str, model_config: Iterable[str], trainable: str, token_fade_in_steps: int | None
) -> None:
    """Raise ValueError for flags of the model that are wrong whatever the checkpoint contains.

    Args:
        model: a name that only looks like a preset, but is no preset, file or folder, is wrong.
        model_config: names of fields of the configuration.
        trainable: parts of a preset are wrong, because its weights are random.
        token_fade_in_steps: wrong for a preset, whose tokens are ordinary ones from the start.
    """
    has_random_weights = is_preset(model)
    looks_like_preset = (model.startswith("vitcls-") or model in PRESETS) and "/" not in model
    if looks_like_preset and not has_random_weights and not Path(model).exists():
        raise ValueError(
            f"`model={model!r}` is not a preset. Use vitcls-{', vitcls-'.join(PRESETS)}"
        )
    if has_random_weights and token_fade_in_steps is not None:
        raise ValueError(
            f"`token_fade_in_steps` requires a checkpoint, but {model} has random weights. Remove it"
        )
    if has_random_weights and trainable != "full":
        raise ValueError(
            f"`trainable={trainable!r}` requires trained weights, but {model} has random weights. "
            "Set `model` to a checkpoint"
        )

    for name in sorted(set(LABEL_FIELDS) & set(model_config)):
        raise ValueError(
            f"`model_config` cannot set `{name}`, which follows from the labels. Remove it"
        )
    known = {field.name for field in fields(ViTCLSConfig)}
    unknown: dict[str, Any] = dict.fromkeys(set(model_config) - known)
    ViTCLSConfig(**unknown)  # Refuses an unknown name, and suggests one


# Trainable parameters -----------------------------------------------------------------------------


def set_trainable_parameters(
    model: Any,
    trainable: str,
    new_parameter_names: Collection[str] = frozenset(),
) -> nn.Module:
    """Freeze the parameters that `trainable` does not select, and return the same model.

    The value "lora" also adds LoRA layers to the query and value projections. The parameters in
    `new_parameter_names` are also trained, because they are not loaded from a checkpoint.

    Raises:
        ValueError: if N in "last-N" exceeds the number of layers, if the model has no tokens that
            "tokens" could train, or if `trainable` is "lora" but PEFT is not installed.
    """
    if trainable == "full":
        return model

    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    prefixes = ["vitcls.pooler."]
    if trainable.startswith("last-"):
        num_layers = len(model.vitcls.layers)
        num_trainable_layers = int(trainable.removeprefix("last-"))
        if num_trainable_layers > num_layers:
            raise ValueError(
                f"`trainable` is {trainable}, but the model has {num_layers} layers. Use a smaller "
                "N"
            )
        layer_indices = range(num_layers - num_trainable_layers, num_layers)
        prefixes += ["vitcls.layernorm.", *(f"vitcls.layers.{index}." for index in layer_indices)]
    trainable_names = {
        name
        for name in parameters
        if not name.startswith("vitcls.") or name.startswith(tuple(prefixes))
    }

    token_names = list_token_parameters(model)
    if trainable == "tokens" and not token_names:
        raise ValueError(
            "`trainable='tokens'` requires a model with special tokens. Set `num_register_tokens=4`, "
            "or `trainable='head'`"
        )
    new_groups = [group for group, name in token_names.items() if name in new_parameter_names]
    if trainable == "lora" or (trainable == "tokens" and not new_groups):
        trainable_names.update(token_names.values())
    trainable_names.update(new_parameter_names)
    for group in new_groups:
        trainable_names.add(f"vitcls.embeddings.position_embeddings.{group}")

    # The mask token was frozen before, and stays so.
    trainable_names &= {name for name, parameter in parameters.items() if parameter.requires_grad}
    # PEFT renames the weights that it wraps, so it comes after their names were collected.
    if trainable == "lora":
        add_lora(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable_names or ".lora_" in name)
    return model


def find_new_tokens(initial: InitialModel, model: Any) -> dict[str, list[bool]]:
    """Find the parameters of new tokens, with their positions.

    The checkpoint says nothing about them, so they train at the rate of the head, and are not averaged
    with their start.

    Returns:
        Name of each parameter -> for each of its tokens, whether it trains: in a group that has
        grown, the first ones stay as they were.
    """
    if initial.has_random_weights:
        return {}
    token_names = list_token_parameters(model)
    grown = find_grown_groups(initial.config, model)

    are_new: dict[str, list[bool]] = {}
    for group, values in grown.items():
        are_new[token_names[group]] = values
        are_new[f"vitcls.embeddings.position_embeddings.{group}"] = values

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: values for name, values in are_new.items() if name in trained}


def keep_old_tokens(model: nn.Module, new_tokens: Mapping[str, Sequence[bool]]) -> None:
    """Set the gradients of tokens that are not new to 0. `new_tokens` is from `find_new_tokens`.

    Hooks would be simpler, but FSDP2 does not call them.
    """
    for name, are_new in new_tokens.items():
        gradient = model.get_parameter(name).grad
        if gradient is not None and not all(are_new):
            shape = (-1,) if gradient.ndim == 1 else (1, -1, 1)
            mask = torch.tensor(are_new, device=gradient.device).view(shape)
            if isinstance(gradient, DTensor):
                mask = distribute_tensor(mask, gradient.device_mesh, gradient.placements)
            gradient.mul_(mask)


def set_train_mode(model: nn.Module) -> None:
    """Set train mode, but keep frozen embeddings and frozen layers in eval mode.

    The frozen modules then have the same outputs as during inference. Use this
    function instead of `model.train()`, even for wrapped models.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, ViTCLSEmbeddings | ViTCLSLayer):
            module.train(any(parameter.requires_grad for parameter in module.parameters()))


# LoRA ---------------------------------------------------------------------------------------------


def add_lora(model: Any) -> None:
    """Replace the query and value projections with PEFT's LoRA layers.

    They are scaled by 1: W x becomes W x + B A x.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("`trainable='lora'` requires PEFT: pip install peft") from error
    inject_adapter_in_model(
        LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGET_MODULES), model
    )


def merge_lora(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge LoRA weights into a state dict of full tensors: W becomes W + B A."""
    merged_weights = {
        name.replace(".base_layer.", "."): weight
        for name, weight in weights.items()
        if ".lora_" not in name
    }
    for name, lora_a in weights.items():
        if name.endswith(LORA_A_SUFFIX):
            layer = name.removesuffix(LORA_A_SUFFIX)
            lora_update = weights[f"{layer}{LORA_B_SUFFIX}"] @ lora_a
            merged_weights[f"{layer}.weight"] = merged_weights[f"{layer}.weight"] + lora_update
    return merged_weights
