# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""Rotary positions, and resampling of weights that depend on the patch grid or patch size.

    rotary position embeddings     (cos, sin) for queries and keys of the patches only
    learned position embeddings    resampled to another patch grid
    patch kernels                  resized to another patch size

Learned and sin-cos position embeddings are added to the patches in blocks_vitcls.py.
"""

import math

import torch
from torch import Tensor, nn

from .configuration_vitcls import ViTCLSConfig
from .field_checks_vitcls import Size


# Rotary position embeddings -----------------------------------------------------------------------
def build_rotary_embeddings(
    config: ViTCLSConfig,
) -> "AxialRotaryEmbeddings | MixedRotaryEmbeddings | None":
    """Build the rotary position embeddings, or return None if the model has none."""
    if not config.has_rotary_positions:
        return None
    if config.position_embedding_type.endswith("rope_mixed"):
        return MixedRotaryEmbeddings(config)
    return AxialRotaryEmbeddings(config)


class AxialRotaryEmbeddings(nn.Module):
    """Rotary embeddings with half of the channels for rows and half for columns.

    Sources: DINOv3, arXiv 2508.10104; EVA-02, arXiv 2303.11331.
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, grid_size: Size, hidden_states: Tensor) -> Tensor:
        """Compute cos and sin, [2, rows * columns, head_dim], in the dtype of `hidden_states`."""
        device = hidden_states.device
        head_dim = self.config.head_dim
        periods = self.config.rope_periods
        coordinates = get_patch_coordinates(self.config, grid_size, device)  # [rows * columns, 2]
        exponents = torch.arange(head_dim // 4, dtype=torch.float32, device=device) * 4 / head_dim
        # [head_dim / 4]
        frequencies = (
            self.config.rope_theta**-exponents
            if periods is None
            else 1 / exponents.new_tensor(periods)
        )
        angles = coordinates[:, :, None] * frequencies  # [rows * columns, 2, head_dim / 4]
        # Channel i is rotated together with channel i + head_dim / 2, so each angle is listed
        # twice.
        angles = angles.flatten(1).tile(2)  # [rows * columns, head_dim]
        return torch.stack([angles.cos(), angles.sin()]).to(hidden_states.dtype)


class MixedRotaryEmbeddings(nn.Module):
    """Rotary embeddings with learned frequencies along both axes, per layer and head.

    Source: RoPE-ViT, arXiv 2403.13298.
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config
        self.frequencies = nn.Parameter(
            torch.empty(
                2, config.num_hidden_layers, config.num_attention_heads, config.head_dim // 2
            )
        )

    def forward(self, grid_size: Size, hidden_states: Tensor) -> list[Tensor]:
        """Compute cos and sin, [2, heads, rows * columns, head_dim], of each layer."""
        # [rows * columns, 2]
        coordinates = get_patch_coordinates(self.config, grid_size, hidden_states.device)
        # [layers, heads, 1, d / 2]
        first_frequencies, second_frequencies = self.frequencies.float().unsqueeze(-2)
        angles = coordinates[:, :1] * first_frequencies + coordinates[:, 1:] * second_frequencies
        angles = angles.tile(2)  # [layers, heads, rows * columns, head_dim]
        # One tensor per layer: reentrant checkpointing detaches no tensors in tuples
        return list(torch.stack([angles.cos(), angles.sin()], dim=1).to(hidden_states.dtype))

    def get_initial_frequencies(self) -> Tensor:
        """Draw axial frequencies, rotated by a random angle per layer and head (RoPE-ViT)."""
        head_dim = self.config.head_dim
        # [head_dim / 4]
        magnitude = self.config.rope_theta ** -(
            torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim
        )
        angle = torch.rand(*self.frequencies.shape[1:3], 1) * 2 * math.pi
        # [layers, heads, head_dim / 2] each
        first_frequencies = torch.cat([magnitude * angle.cos(), -magnitude * angle.sin()], dim=-1)
        second_frequencies = torch.cat([magnitude * angle.sin(), magnitude * angle.cos()], dim=-1)
        return torch.stack([first_frequencies, second_frequencies])


def get_patch_coordinates(config: ViTCLSConfig, grid_size: Size, device: torch.device) -> Tensor:
    """Compute the coordinates [rows * columns, 2] of all patches, row by row.

    `config.rope_axes` sets the axis order. Mixed rotary embeddings use `"grid"` coordinates.
    Coordinates are computed for each grid and need no resampling.
    """
    y, x = (torch.arange(size, dtype=torch.float32, device=device) for size in grid_size)
    is_mixed = config.position_embedding_type.endswith("rope_mixed")
    if config.rope_coordinates == "centered" and not is_mixed:
        # Centers of the patches, from -1 to 1 over the image, times 2 pi (DINOv3).
        y, x = (
            2 * math.pi * ((axis + 0.5) / size * 2 - 1)
            for axis, size in zip((y, x), grid_size, strict=True)
        )
    else:
        # Indices of the patches, scaled to a reference grid (EVA-02, arXiv 2303.11331, section
        # 2.1).
        reference_grid = config.rope_reference_grid or grid_size
        axes = zip((y, x), grid_size, reference_grid, strict=True)
        y, x = (
            (axis + config.rope_grid_offset) / size * reference_size
            for axis, size, reference_size in axes
        )

    coordinates = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
    return coordinates.flip(-1) if config.rope_axes == "xy" else coordinates


def rotate_patches(
    query: Tensor, key: Tensor, position_embeddings: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate the queries [B, heads, n, head_dim] and keys [B, heads, N, head_dim] of the patches.

    The special tokens at the front are not rotated. n is N, or smaller if only special tokens are
    queried.
    """
    cos, sin = position_embeddings
    num_prefix_tokens = key.shape[-2] - cos.shape[-2]

    def rotate(states: Tensor) -> Tensor:
        special_tokens, patches = states.tensor_split([num_prefix_tokens], dim=-2)
        first_half, second_half = patches.chunk(2, dim=-1)
        # The angles may be float32 under autocast.
        patches = patches * cos + torch.cat([-second_half, first_half], dim=-1) * sin
        return torch.cat([special_tokens, patches.to(states.dtype)], dim=-2)

    return query if query.shape[-2] <= num_prefix_tokens else rotate(query), rotate(key)


# Resampling ---------------------------------------------------------------------------------------
def needs_resampling(grid_size: Size, new_grid_size: Size, is_traceable: bool = True) -> bool:
    """Check whether two grids differ. Dynamic sizes count as different, as comparing makes them static."""
    if torch.compiler.is_exporting() and any(
        isinstance(size, torch.SymInt) for size in new_grid_size
    ):
        return True
    return (is_traceable and torch.jit.is_tracing()) or grid_size != new_grid_size


def can_trace_resampling(config: ViTCLSConfig) -> bool:
    """Tell whether TorchScript can keep the size of positions dynamic: no factors, crops or, in ONNX, antialiasing."""
    is_plain = not config.position_offset and config.position_interpolation != "crop"
    return is_plain and not (config.position_antialias and torch.onnx.is_in_onnx_export())


def resample_positions(
    positions: Tensor,
    grid_size: Size,
    new_grid_size: Size,
    config: ViTCLSConfig,
) -> Tensor:
    """Resample learned positions [1, rows * columns, D] to another grid, in float32."""
    maps = positions.float().unflatten(1, grid_size).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    if config.position_interpolation == "crop":
        # Resample to a square as long as the longer side, and keep its top-left part (RADIO, arXiv
        # 2312.06709).
        longer_side = max(new_grid_size)
        square = nn.functional.interpolate(
            maps, size=(longer_side, longer_side), mode="bilinear", align_corners=False
        )
        rows, columns = (torch.arange(length, device=maps.device) for length in new_grid_size)
        # Slices would make exported shapes static.
        maps = square.index_select(2, rows).index_select(3, columns)
    else:
        factors: list[float] | None = None
        if config.position_offset:
            # DINOv2: the scale factor is (new + offset) / old instead of new / old
            factors = [
                (new + config.position_offset) / old
                for new, old in zip(new_grid_size, grid_size, strict=True)
            ]
        maps = nn.functional.interpolate(
            maps,
            size=None if factors else new_grid_size,
            scale_factor=factors,
            mode=config.position_interpolation,
            align_corners=False,
            antialias=config.position_antialias,
        )

    # [1, new rows * new columns, D]
    return maps.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)


def resize_patch_kernel(kernel: Tensor, new_size: Size) -> Tensor:
    """Resize a patch projection [D, C, height, width] to another patch size.

    The new kernel maps a bilinearly resized patch to the embedding of the original patch: exactly
    for larger patches, and in the least-squares sense for smaller ones. The new kernel is pinv(B^T)
    @ kernel; B is the resize matrix (FlexiViT, arXiv 2212.08013, section 3.4).
    """
    height, width = kernel.shape[-2:]
    # CPU: MPS has no float64
    basis = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    # [old pixels, 1, *new_size]: image i is the resized patch in which only pixel i is 1
    resized_basis = nn.functional.interpolate(
        basis, size=new_size, mode="bilinear", align_corners=False
    )
    # [new pixels, old pixels]: the pseudo-inverse of B^T
    inverse = torch.linalg.pinv(resized_basis.flatten(1))
    # [D, C, *new_size]
    new_kernel: Tensor = (kernel.cpu().double().flatten(2) @ inverse.T).unflatten(2, new_size)
    return new_kernel.to(device=kernel.device, dtype=kernel.dtype)
