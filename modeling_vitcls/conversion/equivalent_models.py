"""Rewrite a model into equivalent forms, one of which a transformers class may support.

These forms have the same outputs for images of any size:

    pooling="cls" or "mean"            a classifier on [CLS, mean], with zero weights for the unused half
    position_embedding_tokens          position embeddings of special tokens: zeros, or none if their values are
                                       added to the tokens

The following form has the same outputs only at the native image size, where position embeddings are
not resampled:

    position_antialias, ...            a different resampling policy

A `Rewrite` names configuration fields that get the values of the transformers class, and changes
the weights accordingly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..model.configuration_vitcls import ViTCLSConfig
from ..model.token_layout_vitcls import GROUPS_WITH_POSITIONS
from .weight_rules import Weights


TOKEN_WEIGHT_NAMES = {
    "cls": "embeddings.cls_token",
    "distillation": "embeddings.distillation_token",
    "registers": "embeddings.register_tokens",
}
POSITION_EMBEDDINGS = "embeddings.position_embeddings"
RESAMPLING_FIELDS = ("position_interpolation", "position_offset", "position_antialias")


@dataclass(frozen=True)
class Rewrite:
    """A change of configuration fields and weights that preserves the outputs of a model."""

    fields: tuple[str, ...]  # Fields that get the values of the target
    # Function of the configurations of model and target
    is_possible: Callable[[ViTCLSConfig, ViTCLSConfig], bool]
    # Function (weights, old configuration, new configuration) that changes the weights of the model
    # in place
    rewrite_weights: Callable[[Weights, ViTCLSConfig, ViTCLSConfig], None] = lambda *arguments: None
    # Whether the outputs are the same only for images of `config.image_size`
    is_native_size_only: bool = False


# Classifiers --------------------------------------------------------------------------------------


def can_widen_classifier(config: ViTCLSConfig, target: ViTCLSConfig) -> bool:
    """Check whether a linear classifier reads the CLS token or the mean, and the target both."""
    is_linear = (
        bool(config.num_labels) and config.head_type == "linear" and config.num_cls_tokens > 0
    )
    return is_linear and config.pooling in ("cls", "mean") and target.pooling == "cls_mean"


def widen_classifier(weights: Weights, old_config: ViTCLSConfig, new_config: ViTCLSConfig) -> None:
    """Pad the classifier weight [labels, D] with zeros, for a classifier on [CLS, mean]."""
    halves = [weights["classifier.weight"], torch.zeros_like(weights["classifier.weight"])]
    weights["classifier.weight"] = torch.cat(
        halves if old_config.pooling == "cls" else halves[::-1], dim=1
    )


# Positions ----------------------------------------------------------------------------------------


def move_position_embeddings(
    weights: Weights, old_config: ViTCLSConfig, new_config: ViTCLSConfig
) -> None:
    """Add the position embeddings of special tokens to the tokens, or create zeros."""
    old_groups, new_groups = (
        GROUPS_WITH_POSITIONS[config.position_embedding_tokens]
        for config in (old_config, new_config)
    )
    for group, token_name in TOKEN_WEIGHT_NAMES.items():
        if token_name in weights and group in old_groups and group not in new_groups:
            weights[token_name] = weights[token_name] + weights.pop(
                f"{POSITION_EMBEDDINGS}.{group}"
            )
        elif token_name in weights and group in new_groups and group not in old_groups:
            weights[f"{POSITION_EMBEDDINGS}.{group}"] = torch.zeros_like(weights[token_name])


# All rewrites, in the order in which to_transformers.py tries them.
REWRITES = (
    Rewrite(("pooling",), can_widen_classifier, widen_classifier),
    Rewrite(
        ("position_embedding_tokens",),
        lambda config, target: config.position_embedding_type.startswith("learned"),
        move_position_embeddings,
    ),
    Rewrite(RESAMPLING_FIELDS, lambda config, target: True, is_native_size_only=True),
)
