"""Rewrite a model into equivalent forms, one of which a transformers class may support.

These forms have the same outputs for images of any size:

    pooling="cls" or "mean"            a classifier on [CLS, mean], with zero weights for the unused half
    position_embedding_tokens          position embeddings of special tokens: zeros, or none if their values are
                                       added to the tokens
    position_embedding_type="none"     zero learned position embeddings
    intermediate_size                  additional hidden units with zero weights
    distillation_inference="cls"       no distillation classifier, because inference does not use it
    temperature                        a classifier whose weights are divided by the temperature

The following forms have the same outputs only at the native image size, where position embeddings are not resampled:

    position_antialias, ...            a different resampling policy
    position_embedding_type="sincos_2d"    learned position embeddings with the same values

A `Rewrite` lists new values of configuration fields and changes the weights accordingly.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..blocks_vitcls import SinCosPositionEmbeddings
from ..configuration_vitcls import ViTCLSConfig
from .transformers_families import compute_dinov2_mlp_size
from .weight_rules import Fields, Weights


GROUPS_WITH_POSITIONS: dict[str, tuple[str, ...]] = {
    "patches": (),
    "cls": ("cls",),
    "all": ("cls", "distillation", "registers"),
}
TOKEN_WEIGHT_NAMES = {
    "cls": "embeddings.cls_token",
    "distillation": "embeddings.distillation_token",
    "registers": "embeddings.register_tokens",
}
POSITION_EMBEDDINGS = "embeddings.position_embeddings"
RESAMPLING_POLICIES: list[Fields] = [
    {"position_interpolation": "bicubic", "position_offset": 0.0, "position_antialias": antialias}
    for antialias in (False, True)
]


@dataclass(frozen=True)
class Rewrite:
    """A change of configuration fields and weights that preserves the outputs of a model."""

    propose_changes: Callable[[ViTCLSConfig], list[Fields]]  # returns possible combinations of new field values
    # function (weights, old configuration, new configuration) that changes the weights of the model in place
    rewrite_weights: Callable[[Weights, ViTCLSConfig, ViTCLSConfig], None] = lambda *arguments: None
    is_native_size_only: bool = False  # whether the outputs are the same only for images of `config.image_size`


# Classifiers ---------------------------------------------------------------------------------------------------------


def propose_cls_mean_pooling(config: ViTCLSConfig) -> list[Fields]:
    """Return DINOv2's `cls_mean` pooling if a linear classifier uses the CLS token or the mean of the patches."""
    is_linear = bool(config.num_labels) and config.head_type == "linear" and config.num_cls_tokens > 0
    return [{"pooling": "cls_mean"}] if is_linear and config.pooling in ("cls", "mean") else []


def widen_classifier(weights: Weights, old_config: ViTCLSConfig, new_config: ViTCLSConfig) -> None:
    """Pad the classifier weight [labels, D] with zeros to [labels, 2 * D], for a classifier on [CLS, mean]."""
    halves = [weights["classifier.weight"], torch.zeros_like(weights["classifier.weight"])]
    weights["classifier.weight"] = torch.cat(halves if old_config.pooling == "cls" else halves[::-1], dim=1)


def propose_distillation_head_removal(config: ViTCLSConfig) -> list[Fields]:
    """Return the fields that remove the distillation classifier if inference does not use it."""
    is_unused = config.has_distillation_head and config.distillation_inference == "cls"
    return [{"distillation_inference": "mean", "distillation_head": False}] if is_unused else []


def drop_distillation_classifier(weights: Weights, old_config: ViTCLSConfig, new_config: ViTCLSConfig) -> None:
    """Remove the weights of the distillation classifier."""
    for name in [name for name in weights if name.startswith("distillation_classifier.")]:
        del weights[name]


def propose_temperature_removal(config: ViTCLSConfig) -> list[Fields]:
    """Return a temperature of 1 if the logits of one linear classifier are divided by the temperature."""
    is_foldable = bool(config.num_labels) and config.head_type == "linear" and not config.has_distillation_head
    return [{"temperature": 1.0}] if is_foldable and config.temperature != 1 else []


def fold_temperature(weights: Weights, old_config: ViTCLSConfig, new_config: ViTCLSConfig) -> None:
    """Divide the weights of the classifier by the temperature."""
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name] / old_config.temperature


# Positions -----------------------------------------------------------------------------------------------------------


def propose_position_embedding_tokens(config: ViTCLSConfig) -> list[Fields]:
    """Return all values of `position_embedding_tokens` if the position embeddings are learned."""
    if not config.position_embedding_type.startswith("learned"):
        return []
    return [{"position_embedding_tokens": tokens} for tokens in GROUPS_WITH_POSITIONS]


def move_position_embeddings(weights: Weights, old_config: ViTCLSConfig, new_config: ViTCLSConfig) -> None:
    """Add the position embeddings of special tokens to the tokens, or create zero position embeddings."""
    old_groups, new_groups = (
        GROUPS_WITH_POSITIONS[config.position_embedding_tokens] for config in (old_config, new_config)
    )
    for group, token_name in TOKEN_WEIGHT_NAMES.items():
        if token_name in weights and group in old_groups and group not in new_groups:
            weights[token_name] = weights[token_name] + weights.pop(f"{POSITION_EMBEDDINGS}.{group}")
        elif token_name in weights and group in new_groups and group not in old_groups:
            weights[f"{POSITION_EMBEDDINGS}.{group}"] = torch.zeros_like(weights[token_name])


def propose_learned_positions(config: ViTCLSConfig, fixed_type: str) -> list[Fields]:
    """Return the fields that replace position embeddings of `fixed_type` with learned position embeddings."""
    if config.position_embedding_type != fixed_type:
        return []
    return [
        {"position_embedding_type": "learned", "position_embedding_tokens": tokens} | policy
        for tokens in GROUPS_WITH_POSITIONS
        for policy in RESAMPLING_POLICIES
    ]


def add_learned_positions(weights: Weights, old_config: ViTCLSConfig, new_config: ViTCLSConfig) -> None:
    """Add learned position embeddings [1, rows * columns, D] with sin-cos values, or with zeros."""
    rows, columns = old_config.grid_size
    projection = weights["embeddings.patch_embeddings.projection.weight"]
    positions = projection.new_zeros(1, rows * columns, old_config.hidden_size)
    if old_config.position_embedding_type == "sincos_2d":
        _, positions = SinCosPositionEmbeddings(old_config)({}, positions, (rows, columns))
    weights[f"{POSITION_EMBEDDINGS}.patches"] = positions
    for group in GROUPS_WITH_POSITIONS[new_config.position_embedding_tokens]:
        if TOKEN_WEIGHT_NAMES[group] in weights:
            weights[f"{POSITION_EMBEDDINGS}.{group}"] = torch.zeros_like(weights[TOKEN_WEIGHT_NAMES[group]])


# MLP -----------------------------------------------------------------------------------------------------------------


def propose_wider_mlp(config: ViTCLSConfig) -> list[Fields]:
    """Return the next larger `intermediate_size` that an integer `mlp_ratio` of DINOv2 can represent."""
    is_gated = config.mlp_type != "mlp"
    widths = (compute_dinov2_mlp_size(config.hidden_size, ratio, is_gated) for ratio in range(1, 17))
    return [{"intermediate_size": width} for width in widths if width > config.intermediate_size][:1]


def widen_mlp(weights: Weights, old_config: ViTCLSConfig, new_config: ViTCLSConfig) -> None:
    """Add hidden units with zero weights to each MLP."""
    num_added_units = new_config.intermediate_size - old_config.intermediate_size
    for name, weight in weights.items():
        if re.fullmatch(r"layers\.\d+\.mlp\.(fc1|gate_proj|up_proj)\.(weight|bias)", name):
            weights[name] = pad(weight, (0, num_added_units) if weight.ndim == 1 else (0, 0, 0, num_added_units))
        elif re.fullmatch(r"layers\.\d+\.mlp\.(fc2|down_proj)\.weight", name):
            weights[name] = pad(weight, (0, num_added_units))


# All rewrites, in the order in which to_transformers.py tries them.
REWRITES = (
    Rewrite(propose_distillation_head_removal, drop_distillation_classifier),
    Rewrite(propose_temperature_removal, fold_temperature),
    Rewrite(propose_cls_mean_pooling, widen_classifier),
    Rewrite(propose_wider_mlp, widen_mlp),
    Rewrite(lambda config: propose_learned_positions(config, "none"), add_learned_positions),
    Rewrite(
        lambda config: propose_learned_positions(config, "sincos_2d"), add_learned_positions, is_native_size_only=True
    ),
    Rewrite(propose_position_embedding_tokens, move_position_embeddings),
    Rewrite(lambda config: RESAMPLING_POLICIES, is_native_size_only=True),
)
