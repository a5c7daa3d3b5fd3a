"""Patch features: hidden states of the patches in each layer, and their principal components as colors.

Patches of one object have similar features and thus similar colors (Oquab et al. 2023, arXiv 2304.07193, figure 1).
Features are hidden states before the final norm; models without special tokens have patch features too. The sign of a
principal component is arbitrary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA


NUM_COLOR_CHANNELS = 3  # number of color channels: red, green and blue
# Quantiles of a component that are drawn in the darkest and the brightest color; values beyond these quantiles are
# clipped.
COLOR_QUANTILES = 0.02, 0.98


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
    pixels_by_image = torch.from_numpy(colors).split([image.shape[0] * image.shape[1] for image in features])
    return [rows.unflatten(0, image.shape[:2]) for rows, image in zip(pixels_by_image, features, strict=True)]
