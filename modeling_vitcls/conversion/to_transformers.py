"""Convert ViTCLS models to transformers models with the same outputs.

    model = ViTCLSForImageClassification.from_pretrained(path)
    name, config, resampling = find_transformers_class(type(model).__name__, model.config)
    built_in = build_transformers_model(name, config, model)

A class in `TARGETS` supports a model if the configuration of the class, converted by
transformers_families.py, equals the configuration of the model. If no class supports the model, the
error names the fields that differ. Fields that do not affect outputs in eval mode (dropout, drop
path, initialization) are ignored. The model may be converted in an equivalent form:

    pooling="cls" or "mean"            a classifier on [CLS, mean], with zero weights for the unused half
    position_embedding_tokens          position embeddings of special tokens: zeros, or none if their values are
                                       added to the tokens
    position_antialias, ...            another resampling policy, with the same outputs only at the native image
                                       size, where position embeddings are not resampled

A ViT or DeiT with a non-square image_size accepts only images of that size, because transformers
interpolates position embeddings only from a square grid.
"""

import dataclasses
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..model.adaptation_vitcls import replace_fields
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.modeling_vitcls import ViTCLSPreTrainedModel
from ..model.token_layout_vitcls import COUNT_FIELDS, GROUPS_WITH_POSITIONS, TOKEN_KINDS
from ..runtime.errors import format_error
from .from_transformers import CONVERTIBLE_CLASSES, HEAD_RULES
from .transformers_families import FIELD_NAMES, compute_dinov2_mlp_size, read_label_fields
from .weight_rules import (
    ConversionError,
    Weights,
    revert_weights,
    simplify_size,
    strip_encoder_name,
)


logger = logging.get_logger(__name__)


# Names of the transformers classes to which models are converted.
TARGETS: dict[str, list[str]] = {
    "ViTCLSModel": [
        "ViTModel",
        "DeiTModel",
        "Dinov2Model",
        "Dinov2WithRegistersModel",
        "DINOv3ViTModel",
    ],
    "ViTCLSForImageClassification": [
        "ViTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "DeiTForImageClassification",
        "Dinov2ForImageClassification",
        "Dinov2WithRegistersForImageClassification",
    ],
}
# Classes with the arguments `add_pooling_layer` and `use_mask_token`
OPTIONAL_POOLERS = ("ViTModel", "DeiTModel")


def build_target(name: str, config: ViTCLSConfig) -> PreTrainedModel:
    """Build a newly initialized transformers model with the settings of a configuration."""
    model_class = getattr(transformers, name)
    supported_fields = {field.name for field in dataclasses.fields(model_class.config_class)}
    biases = get_qkv_biases(config)
    is_gated = config.mlp_type != "mlp"
    # DINOv2's configuration has a whole ratio instead of the size, so the ratio is looked up by
    # the size. If several ratios give one size, the smallest is entered last and stays.
    mlp_ratios = {
        compute_dinov2_mlp_size(config.hidden_size, ratio, is_gated): ratio
        for ratio in range(16, 0, -1)
    }

    # The gated MLP of DINOv2 ignores `hidden_act`.
    hidden_act = config.hidden_act
    if "use_gated_mlp" in supported_fields:
        hidden_act = get_activation_name(config)
    settings: dict[str, Any] = {
        **{name: getattr(config, target) for name, target in FIELD_NAMES.items()},
        "image_size": simplify_size(*config.image_height_width),
        "patch_size": simplify_size(*config.patch_height_width),
        "qkv_bias": any(biases.values()),
        "pooler_act": config.pooled_activation or "tanh",
        "mlp_ratio": mlp_ratios.get(config.intermediate_size, 4),
        "use_swiglu_ffn": is_gated,
        "use_gated_mlp": is_gated,
        "hidden_act": hidden_act,
        "layerscale_value": float(config.layer_scale_init_value or 1.0),
        # DINOv2; with registers, a mask token always exists
        "use_mask_token": config.use_mask_token,
        **biases,
        **read_label_fields(config),
    }

    settings = {name: value for name, value in settings.items() if name in supported_fields}
    options = {}
    if name in OPTIONAL_POOLERS:
        options = {
            "add_pooling_layer": config.pooled_activation is not None,
            "use_mask_token": config.use_mask_token,
        }
    model: PreTrainedModel = model_class(model_class.config_class(**settings), **options)
    return model


RESAMPLING_FIELDS = ("position_interpolation", "position_offset", "position_antialias")


def find_transformers_class(name: str, config: ViTCLSConfig) -> tuple[str, ViTCLSConfig, list[str]]:
    """Find the transformers class with the outputs of a model, if possible at all image sizes.

    Args:
        name: The name of the class of the model.
        config: Its configuration.

    Returns:
        The name of the class; the configuration of the model, in the form that is converted; and
        descriptions of the fields that matter only at other image sizes than the native size.

    Raises:
        ConversionError: if no class supports the model.
    """
    if name not in TARGETS:
        raise ConversionError(
            f"transformers has no class for the task of {name}. Convert the encoder, model.vitcls"
        )
    matches = {target: match_target(target, config) for target in TARGETS[name]}
    # With the fewest mismatches and, of these, the fewest differences at other sizes
    target = min(matches, key=lambda each: [len(part) for part in matches[each][1:]])
    config, mismatches, resampling = matches[target]
    if mismatches:
        remedy = ""
        if "fading_tokens" in mismatches:
            remedy = (
                ". No class of transformers fades tokens in. Train until they are, or without it, with "
                "`vitcls finetune --token-fade-in-steps 0`"
            )
        raise ConversionError(
            f"{target}, the nearest class of transformers, does not support the "
            f"model: {', '.join(mismatches.values())}{remedy}"
        )
    return target, config, resampling


def match_target(
    target: str, config: ViTCLSConfig
) -> tuple[ViTCLSConfig, dict[str, str], list[str]]:
    """Compare a model with a class in the equivalent form that is closest to the class.

    Returns:
        The configuration of this form; the description of each field that the class does not
        support, or of an error, by name; and what matters only at other sizes, a text for each field.
    """
    target_config, mismatches = compare_with_target(target, config)
    changeable_fields = set(RESAMPLING_FIELDS)
    if config.position_embedding_type.startswith("learned"):
        changeable_fields.add("position_embedding_tokens")
    pools_both = target_config.pooling == "cls_mean" and config.num_cls_tokens
    if config.pooling in ("cls", "mean") and pools_both:
        changeable_fields.add("pooling")
    changes = {
        name: getattr(target_config, name) for name in mismatches if name in changeable_fields
    }
    resampling = [mismatches[name] for name in RESAMPLING_FIELDS if name in changes]
    if changes:
        config = replace_fields(config, changes)
        _, mismatches = compare_with_target(target, config)
    return config, mismatches, resampling


def compare_with_target(target: str, config: ViTCLSConfig) -> tuple[ViTCLSConfig, dict[str, str]]:
    """Convert a configuration to the target and back, and compare the fields.

    Returns:
        The configuration that came back, or the given one after an error, and the mismatches.
    """
    convertible_class = CONVERTIBLE_CLASSES[target]

    try:
        # This model is only for names, shapes and settings, so its weights take no memory.
        with torch.device("meta"):
            target_model = build_target(target, config)
        weights = strip_encoder_name(target_model.state_dict(), convertible_class.encoder_name)
        # The way back is the code that reads the checkpoints of this class. A field that gets lost
        # on the way becomes a mismatch, not a model with other outputs.
        fields = convertible_class.family.read_all_fields(target_model.config, weights)
        round_trip_config = ViTCLSConfig(**fields | dict(convertible_class.fields))
    except (TypeError, ValueError) as error:
        # The class or this version of transformers does not support a value.
        return config, {"error": format_error(error)}

    has_head = convertible_class.encoder_name is not None
    values = get_compared_fields(config, has_head)
    target_values = get_compared_fields(round_trip_config, has_head)

    # Without a dense layer, users can pool the outputs of a model without a pooler.
    is_pooled_by_user = target in OPTIONAL_POOLERS and config.pooled_activation is None
    ignored_fields = POOLING_FIELDS if is_pooled_by_user else set()
    return round_trip_config, {
        name: f"{name}={value!r} instead of {target_values[name]!r}"
        for name, value in values.items()
        if name not in ignored_fields and is_mismatch(name, value, target_values[name])
    }


def is_mismatch(name: str, value: Any, target_value: Any) -> bool:
    """Check whether the target does not support the value of a field.

    Initial LayerScale values are not compared.

    A target may have biases and LayerScale that the model does not have. These parameters are set
    to `NEUTRAL_WEIGHTS`.
    """
    is_bias = name.endswith("_bias") and name != "relative_position_bias"
    if is_bias or name == "layer_scale_init_value":
        return bool(value and not target_value)
    # For these fields, 0, False, "" and None all say that the model has no such part.
    return bool((value or None) != (target_value or None))


POOLING_FIELDS = {"pooling", "cls_pooling", "pooled_cls_tokens"}
HEAD_FIELDS = {"head_type", "head_hidden_size", "distillation_inference", "extra_heads"}
# Fields that affect only training, or do not affect the model. `build_transformers_model` handles
# the mask token.
IGNORED_FIELDS = frozenset(
    (
        "use_mask_token token_init token_fade_in_steps initializer_range hidden_dropout_prob "
        "attention_probs_dropout_prob drop_path_rate mim_loss norm_pixel_target "
        "_out_features _out_indices apply_layernorm reshape_hidden_states qkv_bias "
        "class_statistics distance_threshold"
    ).split()
)


def get_compared_fields(config: ViTCLSConfig, has_head: bool) -> dict[str, Any]:
    """Select the fields that affect the outputs of a model, for the comparison with a target.

    Equivalent values are mapped to the same value.
    """
    ignored_fields = IGNORED_FIELDS.union(
        [field.name for field in dataclasses.fields(PreTrainedConfig)]
    )
    if not has_head:
        ignored_fields |= HEAD_FIELDS
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ignored_fields
    }

    groups_with_positions = GROUPS_WITH_POSITIONS[config.position_embedding_tokens]
    pools_last_layer = config.pooled_layer_indices == [config.num_hidden_layers]
    return values | {
        "image_size": list(config.image_height_width),
        "patch_size": list(config.patch_height_width),
        "attention_head_size": config.head_dim,
        **get_qkv_biases(config),
        "mlp_type": "mlp" if config.mlp_type == "mlp" else "glu",
        "hidden_act": get_activation_name(config),
        "position_embedding_tokens": [
            name for name in groups_with_positions if getattr(config, COUNT_FIELDS[name])
        ],
        "distillation_head": has_head and config.has_distillation_head,
        "pooled_layers": None if pools_last_layer else config.pooled_layers,
    }


def get_qkv_biases(config: ViTCLSConfig) -> dict[str, bool]:
    """Tell whether each projection has a bias: `query_bias`, `key_bias` and `value_bias`."""
    biases = {name: getattr(config, name) for name in ("query_bias", "key_bias", "value_bias")}
    return {name: config.qkv_bias if bias is None else bias for name, bias in biases.items()}


def get_activation_name(config: ViTCLSConfig) -> str:
    """Name the activation function of a plain MLP, or of the gate of a gated MLP."""
    return "silu" if config.mlp_type == "swiglu" else config.hidden_act


TOKEN_WEIGHT_NAMES = {kind.group: f"embeddings.{kind.parameter}" for kind in TOKEN_KINDS}
POSITION_EMBEDDINGS = "embeddings.position_embeddings"


def rewrite_weights(model: ViTCLSPreTrainedModel, new_config: ViTCLSConfig) -> Weights:
    """Compute the weights of an equivalent form of a model, without the name of the encoder."""
    old_config = model.config
    weights = {
        name: weight
        for name, weight in strip_encoder_name(model.state_dict(), "vitcls").items()
        # transformers returns no distance to the classes
        if not name.startswith("class_distance.")
    }
    if old_config.pooling != new_config.pooling and "classifier.weight" in weights:
        # A classifier of one half of [CLS, mean] has zeros for the other half.
        weight = weights["classifier.weight"]
        halves = [weight, torch.zeros_like(weight)]
        if old_config.pooling == "mean":
            halves.reverse()
        weights["classifier.weight"] = torch.cat(halves, dim=1)

    old_groups, new_groups = (
        GROUPS_WITH_POSITIONS[config.position_embedding_tokens]
        for config in (old_config, new_config)
    )
    for group, token_name in TOKEN_WEIGHT_NAMES.items():
        if token_name in weights and group in old_groups and group not in new_groups:
            positions = weights.pop(f"{POSITION_EMBEDDINGS}.{group}")
            weights[token_name] = weights[token_name] + positions
        elif token_name in weights and group in new_groups and group not in old_groups:
            weights[f"{POSITION_EMBEDDINGS}.{group}"] = torch.zeros_like(weights[token_name])
    return weights


# Value with which a parameter has no effect, by the last component of its name.
NEUTRAL_WEIGHTS = {"bias": 0.0, "lambda1": 1.0, "mask_token": 0.0}


def build_transformers_model(
    target: str, config: ViTCLSConfig, model: ViTCLSPreTrainedModel
) -> PreTrainedModel:
    """Build the transformers model that `find_transformers_class` has found, with the weights of `model`."""
    transformers_model = build_target(target, config)
    target_weights = transformers_model.state_dict()
    convertible_class = CONVERTIBLE_CLASSES[target]
    encoder_name = convertible_class.encoder_name

    weights = rewrite_weights(model, config)
    reference = strip_encoder_name(target_weights, encoder_name)
    if "embeddings.mask_token" in weights and "embeddings.mask_token" not in reference:
        logger.warning(f"{target} has no mask token, so the mask token is dropped")
        del weights["embeddings.mask_token"]
    weights = revert_weights(weights, [*HEAD_RULES, *convertible_class.family.rules], reference)

    for name, weight in target_weights.items():
        encoder_weight_name = name.removeprefix(f"{encoder_name}.")
        parameter_name = name.rpartition(".")[2]
        if encoder_weight_name in weights:
            target_weights[name] = weights[encoder_weight_name]
        elif parameter_name in NEUTRAL_WEIGHTS or not weight.numel():
            target_weights[name] = torch.full_like(weight, NEUTRAL_WEIGHTS.get(parameter_name, 0.0))
        else:
            raise ConversionError(f"weights missing: {name}")

    # `to` is untyped in transformers
    transformers_model.to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    transformers_model.load_state_dict(target_weights)
    transformers_model.eval()
    return transformers_model
