"""Patch features, and their principal components as colors, compared with NumPy."""

import numpy as np
import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, randomize

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.analysis.patch_features import arrange_patch_features, compute_patch_colors


def draw_features(*sizes: tuple[int, int], width: int = 12) -> list[torch.Tensor]:
    """Return random features whose components have different sizes."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(width, 0, -1).float() ** 2
    return [torch.randn(*size, width, generator=generator) * scales + 3 for size in sizes]


@pytest.mark.parametrize("fields", [{}, {"num_cls_tokens": 0, "pooling": "mean"}, {"num_register_tokens": 2}], ids=str)
def test_features_are_the_patches_of_each_layer(fields: dict) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))
    pixels = build_images(2, 24, 40)
    with torch.no_grad():
        states = model.vitcls(pixels, output_hidden_states=True).hidden_states
    features = arrange_patch_features(states, model.vitcls, pixels)
    assert features.shape == (2, 2, 3, 5, 16)
    start = model.config.token_layout.patches.start
    assert torch.equal(features[1, 0, 2, 4], states[1][1, start + 14])
    assert torch.equal(features[0, 1, 1, 0], states[2][0, start + 5])
    half = arrange_patch_features([state.bfloat16() for state in states], model.vitcls, pixels)
    assert half.dtype == torch.float32


def test_colors_are_the_principal_components() -> None:
    """The components are of the patches of all images, up to sign, scaled between two quantiles."""
    features = draw_features((4, 5), (3, 2))
    rows = torch.cat([one.flatten(0, 1) for one in features]).double().numpy()
    centered = rows - rows.mean(axis=0)
    directions = np.linalg.svd(centered, full_matrices=False)[2][:3]
    components = centered @ directions.T
    colors = compute_patch_colors(features)
    assert [tuple(one.shape) for one in colors] == [(4, 5, 3), (3, 2, 3)]
    found = torch.cat([one.flatten(0, 1) for one in colors]).double().numpy()
    for channel in range(3):
        candidates = []
        for sign in (1, -1):
            low, high = np.quantile(sign * components[:, channel], (0.02, 0.98))
            candidates.append(((sign * components[:, channel] - low) / (high - low)).clip(0, 1))
        assert min(np.abs(found[:, channel] - one).max() for one in candidates) < 1e-4
    for small, one in zip(compute_patch_colors([image / 1e4 for image in features]), colors, strict=True):
        assert torch.allclose(small, one, atol=1e-4)


def test_few_patches_and_channels_have_colors_too() -> None:
    (colors,) = compute_patch_colors([torch.randn(1, 2, 4)])
    assert colors.isfinite().all() and (colors[..., 2] == 0.5).all()


@pytest.mark.filterwarnings("error")
def test_equal_patches_have_one_color() -> None:
    """For example, of a black image."""
    (colors,) = compute_patch_colors([torch.ones(3, 4, 8)])
    assert colors.isfinite().all() and len(colors.flatten(0, 1).unique(dim=0)) == 1
