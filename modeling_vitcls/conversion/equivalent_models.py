"""Other forms of a model with the same outputs, which a class of transformers may support.

    pooling="cls" or "mean"            a classifier on [CLS, mean] whose weights for the other half are zero
    position_embedding_tokens          positions of special tokens: zeros, or added to the tokens themselves
    position_embedding_type="none"     learned positions that are zero
    intermediate_size                  more hidden units, whose weights are zero
    distillation_inference="cls"       the unused distillation classifier is removed

These forms are equal only at the native image size, where learned positions are not resampled:

    position_antialias, ...            a different resampling policy
    position_embedding_type="sincos_2d"    learned positions with the same values

A `Rewrite` lists new values of fields and changes the weights accordingly.
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
# Encoder weights, head weights, old and new configuration. Both dicts are changed in place.
RewriteWeights = Callable[[WeightDict, WeightDict, ViTCLSConfig, ViTCLSConfig], None]

POSITIONED_GROUPS: dict[str, tuple[str, ...]] = {
    "patches": (),
    "cls": ("cls",),
    "all": ("cls", "distillation", "registers"),
}
TOKENS = {
    "cls": "embeddings.cls_token",
    "distillation": "embeddings.distillation_token",
    "registers": "embeddings.register_tokens",
}
POSITIONS = "embeddings.position_embeddings"
POLICIES: tuple[Fields, ...] = tuple(
    {"position_interpolation": "bicubic", "position_offset": 0.0, "position_antialias": antialias}
    for antialias in (False, True)
)
MAX_MLP_RATIO = 16


@dataclass(frozen=True)
class Rewrite:
    """An equivalent form of a model."""

    fields: frozenset[str]  # fields that the rewrite may change
    list_changes: Callable[[ViTCLSConfig], list[Fields]]  # returns possible combinations of new field values
    rewrite_weights: RewriteWeights = lambda encoder, head, old, new: None  # changes the weights to the new form
    at_native_size_only: bool = False  # whether the outputs are the same only for images of `config.image_size`


# Classifiers ---------------------------------------------------------------------------------------------------------


def list_cls_mean(config: ViTCLSConfig) -> list[Fields]:
    """Return the pooling of DINOv2's classifier if the model has a linear classifier on the CLS token or the mean."""
    is_linear = bool(config.num_labels) and config.head_type == "linear" and config.num_cls_tokens > 0
    return [{"pooling": "cls_mean"}] if is_linear and config.pooling in ("cls", "mean") else []


def widen_classifier(encoder: WeightDict, head: WeightDict, old: ViTCLSConfig, new: ViTCLSConfig) -> None:
    """Extend the classifier weight [labels, D] by zeros to [labels, 2 D], which reads [CLS, mean]."""
    weight = head["classifier.weight"]
    halves = [weight, torch.zeros_like(weight)]
    head["classifier.weight"] = torch.cat(halves if old.pooling == "cls" else halves[::-1], dim=1)


def list_single_head(config: ViTCLSConfig) -> list[Fields]:
    """Return the fields of a model without the distillation classifier, if inference does not use it."""
    is_unread = config.has_distillation_head and config.distillation_inference == "cls"
    return [{"distillation_inference": "mean", "distillation_head": False}] if is_unread else []


def drop_distillation_classifier(encoder: WeightDict, head: WeightDict, old: ViTCLSConfig, new: ViTCLSConfig) -> None:
    """Remove the weights of the distillation classifier."""
    for name in [name for name in head if name.startswith("distillation_classifier.")]:
        del head[name]


# Positions -----------------------------------------------------------------------------------------------------------


def list_positioned_tokens(config: ViTCLSConfig) -> list[Fields]:
    """Return all values of `position_embedding_tokens`, for learned positions."""
    if not config.position_embedding_type.startswith("learned"):
        return []
    return [{"position_embedding_tokens": tokens} for tokens in POSITIONED_GROUPS]


def move_positions(encoder: WeightDict, head: WeightDict, old: ViTCLSConfig, new: ViTCLSConfig) -> None:
    """Add positions that the new form lacks to their tokens, and zeros for positions that the old form lacks."""
    before, after = (POSITIONED_GROUPS[config.position_embedding_tokens] for config in (old, new))
    for group, token in TOKENS.items():
        if token in encoder and group in before and group not in after:
            encoder[token] = encoder[token] + encoder.pop(f"{POSITIONS}.{group}")
        elif token in encoder and group in after and group not in before:
            encoder[f"{POSITIONS}.{group}"] = torch.zeros_like(encoder[token])


def list_learned_positions(config: ViTCLSConfig, fixed_type: str) -> list[Fields]:
    """Return learned positions for any tokens, instead of positions of `fixed_type`."""
    if config.position_embedding_type != fixed_type:
        return []
    return [
        {"position_embedding_type": "learned", "position_embedding_tokens": tokens} | policy
        for tokens in POSITIONED_GROUPS
        for policy in POLICIES
    ]


def add_learned_positions(encoder: WeightDict, head: WeightDict, old: ViTCLSConfig, new: ViTCLSConfig) -> None:
    """Write the old form's fixed positions, or zeros, as learned positions [1, rows * columns, D]."""
    rows, columns = old.grid_size
    like = encoder["embeddings.patch_embeddings.projection.weight"]
    positions = torch.zeros(1, rows * columns, old.hidden_size, dtype=like.dtype, device=like.device)
    if old.position_embedding_type == "sincos_2d":
        _, positions = SinCosPositions(old)({}, positions, (rows, columns))
    encoder[f"{POSITIONS}.patches"] = positions
    for group in POSITIONED_GROUPS[new.position_embedding_tokens]:
        if TOKENS[group] in encoder:
            encoder[f"{POSITIONS}.{group}"] = torch.zeros_like(encoder[TOKENS[group]])


# MLP -----------------------------------------------------------------------------------------------------------------


def list_wider_mlp(config: ViTCLSConfig) -> list[Fields]:
    """Return the next larger size of DINOv2's MLP, which is a multiple of the hidden size."""
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


# Rewrites, in the order in which they are tried.
REWRITES = (
    Rewrite(
        frozenset({"distillation_inference", "distillation_head"}), list_single_head, drop_distillation_classifier
    ),
    Rewrite(frozenset({"pooling"}), list_cls_mean, widen_classifier),
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
    Rewrite(frozenset({"position_embedding_tokens"}), list_positioned_tokens, move_positions),
    Rewrite(
        frozenset({"position_antialias", "position_offset", "position_interpolation"}),
        lambda config: list(POLICIES),
        at_native_size_only=True,
    ),
)
