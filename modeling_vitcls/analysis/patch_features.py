"""Patch features: principal components as colors, and cosine similarity to one patch, in each layer.

Patches of one object have similar features and thus similar colors (Oquab et al. 2023, arXiv 2304.07193, figure 1).
Features are hidden states before the final norm; models without special tokens have patch features too. The sign of a
principal component is arbitrary. This file is part of the demo (publishing/space.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA

from .maps import (
    HIDDEN_BRIGHTNESS,
    VisibleRegion,
    draw_hatching,
    resize_with_region,
    to_gray,
    to_upright_rgb,
    upsample_maps,
)


NUM_COLOR_CHANNELS = 3  # number of color channels: red, green and blue
NUM_COMPONENTS = 32  # number of principal components of compressed features
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


def compute_patch_colors(features: Sequence[torch.Tensor], foreground_only: bool = False) -> list[torch.Tensor]:
    """Return the first three principal components of the patches of one layer as colors.

    The components are computed from all images together, so that equal colors mean similar features in all images.

    Args:
        features: [gh, gw, D] for each image; sizes may differ.
        foreground_only: whether to color only the foreground (`find_foreground`). The colors are then the principal
            components of the foreground patches.

    Returns:
        [gh, gw, 3] for each image, values from 0 to 1; NaN in the background.
    """
    rows = torch.cat([image.flatten(0, 1) for image in features]).numpy()  # [patches, D]
    is_shown = find_foreground(features, rows) if foreground_only else np.ones(len(rows), dtype=bool)
    colors = np.full((len(rows), NUM_COLOR_CHANNELS), np.nan, dtype=np.float32)
    num_components = min(NUM_COLOR_CHANNELS, *rows[is_shown].shape)
    if num_components:
        components = PCA(num_components, random_state=0).fit_transform(rows[is_shown])
        low, high = np.quantile(components, COLOR_QUANTILES, axis=0)
        colors[is_shown] = 0.5  # value of missing components if there are fewer than three components
        colors[is_shown, :num_components] = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return split_by_image(torch.from_numpy(colors), features)


def find_foreground(features: Sequence[torch.Tensor], rows: np.ndarray) -> np.ndarray:
    """Return a mask [patches] of the foreground: the patches whose first principal component has the sign that is less
    frequent at the borders of the images than elsewhere."""
    is_foreground = PCA(1, random_state=0).fit_transform(rows)[:, 0] > 0
    borders = [np.ones(image.shape[:2], dtype=bool) for image in features]
    for border in borders:
        border[1:-1, 1:-1] = False
    is_border = np.concatenate([border.ravel() for border in borders])
    is_inverted = not is_border.all() and is_foreground[is_border].mean() > is_foreground[~is_border].mean()
    return ~is_foreground if is_inverted else is_foreground


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

    The background (NaN) is dark, and pixels outside the visible region are dark and hatched.

    Args:
        visible_region, max_side, min_side: as in `maps.overlay`.
    """
    resized_image, region = resize_with_region(to_upright_rgb(image), visible_region, max_side, min_side)
    gray = to_gray(resized_image)  # [h, w, 3]
    is_background = colors.isnan().any(dim=-1, keepdim=True).float()  # [gh, gw, 1]
    channel_maps = torch.cat([colors.nan_to_num(), is_background], dim=-1).permute(2, 0, 1)  # [4, gh, gw]
    pixel_maps = upsample_maps(channel_maps, gray.shape[:2], region, interpolate=False).permute(1, 2, 0).numpy()
    canvas, background = pixel_maps[:, :, :3], pixel_maps[:, :, 3:]
    canvas = np.where(background > 0, gray * HIDDEN_BRIGHTNESS, canvas)
    canvas = np.where(np.isnan(background), draw_hatching(gray), canvas)
    return Image.fromarray((canvas * 255).round().astype(np.uint8))


# Similarity ----------------------------------------------------------------------------------------------------------


def compute_patch_similarity(features: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Return the cosine similarity [gh, gw] between one patch and all patches of an image in one layer.

    Args:
        features: [gh, gw, D].
        row, column: row and column of the patch, counted from 0.
    """
    return torch.nn.functional.cosine_similarity(features, features[row, column], dim=-1)


@dataclass(frozen=True)
class PatchComponents:
    """Principal components of normalized patch features of one layer, from which a browser computes similarities.

    The cosine similarity between two patches with values x and y is f(x, y) / sqrt(f(x, x) f(y, y)), where f(x, y) is
    sum(scale² x y) + offset.
    """

    values: list[torch.Tensor]  # [gh, gw, n] int8 for each image
    scale: torch.Tensor  # [n], scale factor of each component's values
    offset: float  # squared norm of the part of the mean feature that is orthogonal to all principal components


def compress_patch_features(features: Sequence[torch.Tensor], num_components: int = NUM_COMPONENTS) -> PatchComponents:
    """Compress the features [gh, gw, D] of several images after one layer to `num_components` bytes per patch."""
    rows = torch.cat([torch.nn.functional.normalize(image.flatten(0, 1), dim=-1) for image in features]).numpy()
    pca = PCA(min(num_components, *rows.shape), random_state=0).fit(rows)
    projections = torch.from_numpy(rows @ pca.components_.T)  # [patches, n], not centered
    scale = (projections.abs().amax(dim=0) / torch.iinfo(torch.int8).max).clamp(min=1e-12)
    values = (projections / scale).round().to(torch.int8)
    offset = float((pca.mean_**2).sum() - ((pca.components_ @ pca.mean_) ** 2).sum())
    return PatchComponents(split_by_image(values, features), scale, max(offset, 0.0))
