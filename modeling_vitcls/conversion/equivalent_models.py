"""Rewrite a model into equivalent forms, one of which a transformers class may support.

These forms have the same outputs for images of any size:

    pooling="cls" or "mean"            a classifier on [CLS, mean], with zero weights for the unused half
    position_embedding_tokens          position embeddings of special tokens: zeros, or added to the tokens
    position_embedding_type="none"     learned position embeddings that are zero
    intermediate_size                  additional hidden units with zero weights
    distillation_inference="cls"       no distillation classifier, because inference does not use it

The following forms have the same outputs only at the native image size, where position embeddings are not resampled:

    position_antialias, ...            a different resampling policy
    position_embedding_type="sincos_2d"    learned position embeddings with the same values

A `Rewrite` lists new values of configuration fields, and changes the weights accordingly.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..blocks_vitcls import SinCosPositions
from ..configuration_vitcls import ViTCLSConfig
from .transformers_families import compute_dinov2_mlp_size
from .weight_rules import Fields


WeightDict = dict[str, torch.Tensor]
# Function (encoder weights, head weights, old and new configuration) that changes both weight dicts in place.
WeightRewritingFunction = Callable[[WeightDict, WeightDict, ViTCLSConfig, ViTCLSConfig], None]

GROUPS_WITH_POSITIONS: dict[str, tuple[str, ...]] = {
    "patches": (),
    "cls": ("cls",),
    "all": ("cls", "distillation", "registers"),
}
TOKEN_NAMES = {
    "cls": "embeddings.cls_token",
    "distillation": "embeddings.distillation_token",
    "registers": "embeddings.register_tokens",
}
POSITION_EMBEDDINGS = "embeddings.position_embeddings"
RESAMPLING_POLICIES: tuple[Fields, ...] = tuple(
    {"position_interpolation": "bicubic", "position_offset": 0.0, "position_antialias": antialias}
    for antialias in (False, True)
)
MAX_MLP_RATIO = 16


@dataclass(frozen=True)
class Rewrite:
    """A change of configuration fields and weights that preserves the outputs of a model."""

    fields: frozenset[str]  # configuration fields that the rewrite may change
    list_changes: Callable[[ViTCLSConfig], list[Fields]]  # returns possible combinations of new field values
    # Function that changes the weights to the new form
    rewrite_weights: WeightRewritingFunction = lambda encoder, head, old, new: None
    at_native_size_only: bool = False  # whether the outputs are the same only for images of `config.image_size`


# Classifiers ---------------------------------------------------------------------------------------------------------


def list_cls_mean_pooling(config: ViTCLSConfig) -> list[Fields]:
    """Return DINOv2's `cls_mean` pooling if a linear classifier reads the CLS token or the mean of the patches."""
    is_linear = bool(config.num_labels) and config.head_type == "linear" and config.num_cls_tokens > 0
    return [{"pooling": "cls_mean"}] if is_linear and config.pooling in ("cls", "mean") else []


def widen_classifier(encoder: WeightDict, head: WeightDict, old: ViTCLSConfig, new: ViTCLSConfig) -> None:
    """Pad the classifier weight [labels, D] with zeros to [labels, 2 * D], for a classifier that reads [CLS, mean]."""
    weight = head["classifier.weight"]
    halves = [weight, torch.zeros_like(weight)]
    head["classifier.weight"] = torch.cat(halves if old.pooling == "cls" else halves[::-1], dim=1)


def list_distillation_head_removal(config: ViTCLSConfig) -> list[Fields]:
    """Return the fields that remove the distillation classifier if inference does not use it."""
    is_unused = config.has_distillation_head and config.distillation_inference == "cls"
    return [{"distillation_inference": "mean", "distillation_head": False}] if is_unused else []


def drop_distillation_classifier(encoder: WeightDict, head: WeightDict, old: ViTCLSConfig, new: ViTCLSConfig) -> None:
    """Remove the weights of the distillation classifier."""
    for name in [name for name in head if name.startswith("distillation_classifier.")]:
        del head[name]


# Positions -----------------------------------------------------------------------------------------------------------


def list_position_embedding_tokens(config: ViTCLSConfig) -> list[Fields]:
    """Return all values of `position_embedding_tokens` if the position embeddings are learned."""
    if not config.position_embedding_type.startswith("learned"):
        return []
    return [{"position_embedding_tokens": tokens} for tokens in GROUPS_WITH_POSITIONS]


def move_positions(encoder: WeightDict, head: WeightDict, old: ViTCLSConfig, new: ViTCLSConfig) -> None:
    """Add the position embeddings of special tokens to the tokens, or create zero embeddings, for the new form."""
    old_groups, new_groups = (GROUPS_WITH_POSITIONS[config.position_embedding_tokens] for config in (old, new))
    for group, token in TOKEN_NAMES.items():
        if token in encoder and group in old_groups and group not in new_groups:
            encoder[token] = encoder[token] + encoder.pop(f"{POSITION_EMBEDDINGS}.{group}")
        elif token in encoder and group in new_groups and group not in old_groups:
            encoder[f"{POSITION_EMBEDDINGS}.{group}"] = torch.zeros_like(encoder[token])


def list_learned_positions(config: ViTCLSConfig, fixed_type: str) -> list[Fields]:
    """Return the fields that replace position embeddings of `fixed_type` with learned position embeddings."""
    if config.position_embedding_type != fixed_type:
        return []
    return [
        {"position_embedding_type": "learned", "position_embedding_tokens": tokens} | policy
        for tokens in GROUPS_WITH_POSITIONS
        for policy in RESAMPLING_POLICIES
    ]


def add_learned_positions(encoder: WeightDict, head: WeightDict, old: ViTCLSConfig, new: ViTCLSConfig) -> None:
    """Add learned position embeddings [1, rows * columns, D] with the old form's fixed values, or with zeros."""
    rows, columns = old.grid_size
    projection = encoder["embeddings.patch_embeddings.projection.weight"]
    positions = torch.zeros(1, rows * columns, old.hidden_size, dtype=projection.dtype, device=projection.device)
    if old.position_embedding_type == "sincos_2d":
        _, positions = SinCosPositions(old)({}, positions, (rows, columns))
    encoder[f"{POSITION_EMBEDDINGS}.patches"] = positions
    for group in GROUPS_WITH_POSITIONS[new.position_embedding_tokens]:
        if TOKEN_NAMES[group] in encoder:
            encoder[f"{POSITION_EMBEDDINGS}.{group}"] = torch.zeros_like(encoder[TOKEN_NAMES[group]])


# MLP -----------------------------------------------------------------------------------------------------------------


def list_wider_mlp(config: ViTCLSConfig) -> list[Fields]:
    """Return the next larger `intermediate_size` that an integer `mlp_ratio` of DINOv2 can represent."""
    widths = (
        compute_dinov2_mlp_size(config.hidden_size, ratio, config.mlp_type != "mlp")
        for ratio in range(1, MAX_MLP_RATIO + 1)
    )
    return [{"intermediate_size": width} for width in widths if width > config.intermediate_size][:1]


def widen_mlp(encoder: WeightDict, head: WeightDict, old: ViTCLSConfig, new: ViTCLSConfig) -> None:
    """Add hidden units with zero weights to each MLP."""
    num_added = new.intermediate_size - old.intermediate_size
    for name, weight in encoder.items():
        if re.fullmatch(r"layers\.\d+\.mlp\.(fc1|gate_proj|up_proj)\.(weight|bias)", name):
            encoder[name] = pad(weight, (0, num_added) if weight.ndim == 1 else (0, 0, 0, num_added))
        elif re.fullmatch(r"layers\.\d+\.mlp\.(fc2|down_proj)\.weight", name):
            encoder[name] = pad(weight, (0, num_added))


# All rewrites, in the order in which to_transformers.py tries them.
REWRITES = (
    Rewrite(
        frozenset({"distillation_inference", "distillation_head"}),
        list_distillation_head_removal,
        drop_distillation_classifier,
    ),
    Rewrite(frozenset({"pooling"}), list_cls_mean_pooling, widen_classifier),
    Rewrite(frozenset({"intermediate_size"}), list_wider_mlp, widen_mlp),
    Rewrite(
        frozenset({"position_embedding_type"}),
        lambda config: list_learned_positions(config, "none"),
        add_learned_positions,
    ),
    Rewrite(
        frozenset({"position_embedding_type"}),
        lambda config: list_learned_positions(config, "sincos_2d"),
        add_learned_positions,
        at_native_size_only=True,
    ),
    Rewrite(frozenset({"position_embedding_tokens"}), list_position_embedding_tokens, move_positions),
    Rewrite(
        frozenset({"position_antialias", "position_offset", "position_interpolation"}),
        lambda config: list(RESAMPLING_POLICIES),
        at_native_size_only=True,
    ),
)
