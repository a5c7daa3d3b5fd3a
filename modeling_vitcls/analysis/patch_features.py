"""Patch features: principal components as colors, and cosine similarity to one patch, in each layer.

Patches of one object have similar features and thus similar colors (Oquab et al. 2023, arXiv 2304.07193, figure 1).
Features are hidden states before the final norm; models without special tokens have patch features too. The sign of a
principal component is arbitrary. This file is part of the demo (publishing/space.py).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA

from .maps import (
    VisibleRegion,
    draw_hatching,
    resize_with_region,
    to_gray,
    to_upright_rgb,
    upsample_maps,
)


NUM_COLOR_CHANNELS = 3  # number of color channels: red, green and blue
# Quantiles of a component that are drawn in the darkest and the brightest color; values beyond these quantiles are
# clipped.
COLOR_QUANTILES = 0.02, 0.98


@torch.no_grad()
def compute_patch_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of the patches after each layer, before the final norm.

    Args:
        model: any ViTCLS model, in evaluation mode.
        pixel_values: [B, C, H, W] on the model's device.

    Returns:
        [B, L, gh, gw, D], float32 on the CPU: image, layer, row and column of the patch, channel.
    """
    encoder = model.base_model
    outputs = encoder(pixel_values, output_hidden_states=True)
    return arrange_patch_features(outputs.hidden_states, encoder, pixel_values)


def arrange_patch_features(
    hidden_states: Sequence[torch.Tensor], encoder: Any, pixel_values: torch.Tensor
) -> torch.Tensor:
    """Return the states of the patches [B, L, gh, gw, D] after each layer. `hidden_states` [B, N, D] are the
    embeddings and the output of each layer."""
    grid_size = encoder.embeddings.patch_embeddings.get_grid_size(pixel_values)
    patch_slice = encoder.config.token_layout.patches
    layer_states = [state[:, patch_slice].float().cpu().unflatten(1, grid_size) for state in hidden_states[1:]]
    return torch.stack(layer_states, dim=1)


# Colors --------------------------------------------------------------------------------------------------------------


def compute_patch_colors(features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the first three principal components of the patches of one layer as colors.

    The components are computed from all images together, so that equal colors mean similar features in all images.

    Args:
        features: [gh, gw, D] for each image; sizes may differ.

    Returns:
        [gh, gw, 3] for each image, values from 0 to 1.
    """
    rows = torch.cat([image.flatten(0, 1) for image in features]).numpy()  # [patches, D]
    num_components = min(NUM_COLOR_CHANNELS, *rows.shape)
    with np.errstate(invalid="ignore"):  # the variance of equal patches is 0
        components = PCA(num_components, random_state=0).fit_transform(rows)
    low, high = np.quantile(components, COLOR_QUANTILES, axis=0)
    # 0.5 is the value of missing components if there are fewer than three components.
    colors = np.full((len(rows), NUM_COLOR_CHANNELS), 0.5, dtype=np.float32)
    colors[:, :num_components] = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return split_by_image(torch.from_numpy(colors), features)


def split_by_image(rows: torch.Tensor, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Split rows [patches, n] into one tensor [gh, gw, n] per image, with the grid sizes of `features`."""
    sizes = [image.shape[0] * image.shape[1] for image in features]
    pairs = zip(rows.split(sizes), features, strict=True)
    return [image_rows.unflatten(0, image.shape[:2]) for image_rows, image in pairs]


def draw_patch_colors(
    image: Image.Image,
    colors: torch.Tensor,
    visible_region: VisibleRegion | None = None,
    max_side: int | None = None,
    min_side: int | None = None,
) -> Image.Image:
    """Draw the colors of the patches [gh, gw, 3] on the pixels of an image, without interpolation.

    Pixels outside the visible region are dark and hatched.

    Args:
        visible_region, max_side, min_side: as in `maps.overlay`.
    """
    resized_image, region = resize_with_region(to_upright_rgb(image), visible_region, max_side, min_side)
    gray = to_gray(resized_image)  # [h, w, 3]
    canvas = upsample_maps(colors.permute(2, 0, 1), gray.shape[:2], region, interpolate=False).permute(1, 2, 0).numpy()
    canvas = np.where(np.isnan(canvas), draw_hatching(gray), canvas)
    return Image.fromarray((canvas * 255).round().astype(np.uint8))


# Similarity ----------------------------------------------------------------------------------------------------------


def compute_patch_similarity(features: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Return the cosine similarity [gh, gw] between one patch and all patches of an image in one layer.

    Args:
        features: [gh, gw, D].
        row, column: row and column of the patch, counted from 0.
    """
    return torch.nn.functional.cosine_similarity(features, features[row, column], dim=-1)
