"""One pass of images through a frozen encoder, whose features serve everything that follows.

    images -> encoder, once -> per layer: final norm, CLS and mean of the patches -> Features

The features of a layer are what a classifier with `config.pooled_layers` reads, so a linear
classifier of them is the model's classifier.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ..data.images import LabeledImages
from ..inference.image_pass import ImageOutputs, ImagePass
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.field_checks_vitcls import Size
from ..model.heads_vitcls import TokenPooler, build_pooler
from ..speed.lean_layers import use_fast_modules
from .class_statistics import Token


OWN_POOLING = "own"  # Tokens of a candidate that reads the output of the model's pooler
# Widths of the rings at the border of an image, as fractions of its sides; at least one patch
RING_WIDTHS = (0, 1 / 8)


@dataclass(frozen=True)
class FeatureLayout:
    """Where the features of each layer and kind of token are in a vector of features."""

    num_layers: int  # The last layers, the earliest first
    widths: dict[str, int]  # Kind of token -> number of features; the same in each layer

    @classmethod
    def for_extra_heads(cls, config: ViTCLSConfig, num_layers: int) -> "FeatureLayout":
        """Build the layout of the last `num_layers` for heads that do not use the model's pooler."""
        kinds = ("cls", "mean") if config.num_cls_tokens else ("mean",)
        widths = {kind: config.compute_pooled_size(kind, 1) for kind in kinds}
        return cls(min(num_layers, config.num_hidden_layers), widths)


def has_searchable_pooling(config: ViTCLSConfig) -> bool:
    """Return whether the pooler has no weights, and reads CLS or the mean of the patches."""
    is_plain = config.pooled_activation is None and not config.pooled_norm
    return is_plain and config.pooling in ("cls", "mean", "cls_mean")


def pool_layers(encoder: Any, outputs: Any, layout: FeatureLayout) -> Tensor:
    """Pool each layer that a classifier may read, side by side: [B, all].

    The outputs, of the encoder or of its classifier, must contain the hidden states.
    """
    if OWN_POOLING in layout.widths:
        pooler = encoder.pooler or build_pooler(encoder.config)
        tokens = [
            encoder.normalize(outputs.hidden_states[index])
            for index in encoder.pooled_layer_indices
        ]
        return pooler(tokens if len(tokens) > 1 else tokens[0]).float()

    poolers = [TokenPooler(encoder.config, kind) for kind in layout.widths]
    parts = []
    for states in outputs.hidden_states[-layout.num_layers :]:
        normalized = encoder.normalize(states)  # [B, N, D]
        parts += [pooler(normalized).float() for pooler in poolers]
    return torch.cat(parts, dim=1)


def pool_rings(encoder: Any, outputs: Any, num_layers: int) -> Tensor:
    """Pool the rings at the border of images: [B, rings, layers, D], parts of the mean of the patches."""
    layers = []
    for states in outputs.hidden_states[-num_layers:]:
        patches = encoder.normalize(states)[:, encoder.config.token_layout.patches].float()
        rings = [patches[:, ring].sum(dim=1) for ring in mark_rings(outputs.grid_size)]
        layers.append(torch.stack(rings, dim=1) / patches.shape[1])
    return torch.stack(layers, dim=2)


def mark_rings(grid_size: Size) -> list[np.ndarray]:
    """Mark the patches [rows * columns] of each ring at the border."""
    rings = []
    for width in RING_WIDTHS:
        is_border = np.ones(grid_size, dtype=bool)
        rows, columns = (max(1, round(side * width)) for side in grid_size)
        is_border[rows:-rows, columns:-columns] = False
        rings.append(is_border.ravel())
    return rings


@dataclass(frozen=True, kw_only=True)
class Features(ImageOutputs):
    """Features of the readable images of a pass."""

    layout: FeatureLayout

    def get_tokens(self) -> dict[Token, np.ndarray]:
        """Divide the features into those [N, D] of each token, in the order of a classifier's weights.

        The order is layer after layer; in each, the order of `widths`.
        """
        widths = self.layout.widths
        tokens = [(layer, kind) for layer in range(-self.layout.num_layers, 0) for kind in widths]
        ends = np.cumsum([widths[kind] for _, kind in tokens])
        return dict(zip(tokens, np.split(self.features, ends[:-1], axis=1), strict=True))


def compute_features(
    model: Any,
    images: LabeledImages,
    layout: FeatureLayout,
    has_logits: bool = False,
    has_rings: bool = False,
    console: Console | None = None,
    **arguments: Any,
) -> Features:
    """Compute the features of images in one pass; they are the same on every process.

    Args:
        model: a classifier or an encoder.
        images: what passes it.
        layout: of the features.
        has_logits: whether the logits of the classifier are computed, too.
        has_rings: whether the parts of the mean of the patches at the border of the images are computed,
            too.
        console: shows the progress.
        arguments: of `ImagePass`.
    """
    encoder = use_fast_modules(model.base_model, packed=True)
    program = model if has_logits else encoder

    def compute(pixel_values: Tensor) -> dict[str, Tensor]:
        outputs = program(pixel_values, output_hidden_states=True)
        computed = {"features": pool_layers(encoder, outputs, layout)}
        if has_logits:
            computed["logits"] = outputs.logits
        if has_rings:
            computed["rings"] = pool_rings(encoder, outputs, layout.num_layers)
        return computed

    outputs = ImagePass(images, **arguments).collect(encoder, compute, console)
    return Features(layout=layout, **vars(outputs))
