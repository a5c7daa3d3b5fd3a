"""Rotary positions: queries and keys of the patches turn by angles that their places give; special tokens stay.

Each kind computes, for one grid, a pair `(cos, sin)` per layer, and `rotate_patches` applies it inside attention.
Coordinates are computed for every grid afresh, so rectangles and other sizes need no resampling.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from .configuration_vitcls import ViTCLSConfig


Rotation = tuple[torch.Tensor, torch.Tensor] | None  # cos, sin: [patches, head_dim] or [heads, patches, head_dim]


class AxialRotaryPositions(nn.Module):
    """Half of the channels turn with the row, half with the column (DINOv3, arXiv 2508.10104; EVA-02)."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.num_layers = config.num_hidden_layers
        self.theta = float(config.rope_theta)
        self.head_dim = config.head_dim
        self.coordinates: Callable = COORDINATES[config.rope_coordinates](config)

    def forward(self, grid: tuple[int, int], hidden_states: torch.Tensor) -> list[Rotation]:
        """The same pair [rows * columns, head_dim] for each layer, in the dtype of `hidden_states`."""
        device = hidden_states.device
        places = self.coordinates(grid, device)  # [N, 2]
        exponents = torch.arange(self.head_dim // 4, dtype=torch.float32, device=device) * 4 / self.head_dim
        angles = places[:, :, None] * self.theta**-exponents  # [N, 2, head_dim / 4]
        angles = angles.flatten(1).tile(2)  # [N, head_dim]
        rotation = angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)
        return [rotation] * self.num_layers


class MixedRotaryPositions(nn.Module):
    """Each layer and head learns its own frequencies along both axes (RoPE-ViT, arXiv 2403.13298)."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.theta = float(config.rope_theta)
        self.coordinates = GridCoordinates(config)
        self.frequencies = nn.Parameter(
            torch.empty(2, config.num_hidden_layers, config.num_attention_heads, config.head_dim // 2)
        )

    def forward(self, grid: tuple[int, int], hidden_states: torch.Tensor) -> list[Rotation]:
        """One pair [heads, rows * columns, head_dim] per layer, in the dtype of `hidden_states`."""
        first, second = self.coordinates(grid, hidden_states.device).unbind(-1)  # [N] each
        by_first, by_second = self.frequencies.float().unsqueeze(-2)  # [layers, heads, 1, head_dim / 2] each
        angles = first[:, None] * by_first + second[:, None] * by_second  # [layers, heads, N, head_dim / 2]
        angles = angles.tile(2)  # [layers, heads, N, head_dim]
        cos, sin = angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)
        return list(zip(cos, sin, strict=True))

    def initial_frequencies(self) -> torch.Tensor:
        """Axial frequencies, turned by a random angle per layer and head (the paper's initialisation)."""
        _, layers, heads, half = self.frequencies.shape
        magnitude = self.theta ** -(torch.arange(0, 2 * half, 4, dtype=torch.float32) / (2 * half))  # [head_dim / 4]
        angle = torch.rand(layers, heads, 1) * 2 * math.pi
        along_first = torch.cat([magnitude * angle.cos(), -magnitude * angle.sin()], dim=-1)
        along_second = torch.cat([magnitude * angle.sin(), magnitude * angle.cos()], dim=-1)
        return torch.stack([along_first, along_second])


class NoRotaryPositions(nn.Module):
    """Stands where rotary positions would, for models whose queries and keys are not rotated."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.num_layers = config.num_hidden_layers

    def forward(self, grid: tuple[int, int], hidden_states: torch.Tensor) -> list[Rotation]:
        """Nothing to rotate by, for each layer."""
        return [None] * self.num_layers


ROTARY_POSITIONS: dict[str, type[nn.Module]] = {
    "rope_2d": AxialRotaryPositions,
    "learned_rope_2d": AxialRotaryPositions,
    "rope_mixed": MixedRotaryPositions,
    "learned_rope_mixed": MixedRotaryPositions,
    "learned": NoRotaryPositions,
    "sincos_2d": NoRotaryPositions,
    "none": NoRotaryPositions,
}


class CenteredCoordinates:
    """Patch centres from -1 to 1 along each axis of the image, times 2 pi (DINOv3)."""

    def __init__(self, config: ViTCLSConfig) -> None:
        self.arrange = AXES[config.rope_axes]

    def __call__(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """[rows * columns, 2]."""
        y, x = ((torch.arange(size, dtype=torch.float32, device=device) + 0.5) / size * 2 - 1 for size in grid)
        return 2 * math.pi * self.arrange(y, x)


class GridCoordinates:
    """Patch indices, scaled to a reference grid if there is one (EVA-02, arXiv 2303.11331, section 2.1)."""

    def __init__(self, config: ViTCLSConfig) -> None:
        self.arrange = AXES[config.rope_axes]
        self.offset = float(config.rope_grid_offset)
        self.reference = config.rope_reference_grid

    def __call__(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """[rows * columns, 2]."""
        reference = self.reference or grid
        y, x = (
            (torch.arange(size, dtype=torch.float32, device=device) + self.offset) / size * wanted
            for size, wanted in zip(grid, reference, strict=True)
        )
        return self.arrange(y, x)


COORDINATES: dict[str, Callable] = {"centered": CenteredCoordinates, "grid": GridCoordinates}


def rows_first(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Axes [rows], [columns] -> pairs (y, x) of all patches, row by row, [rows * columns, 2]."""
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)


def columns_first(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As `rows_first`, as pairs (x, y)."""
    return rows_first(y, x).flip(-1)


AXES = {"yx": rows_first, "xy": columns_first}


def rotate_patches(
    query: torch.Tensor, key: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries [B, heads, n, head_dim] and keys [B, heads, N, head_dim] of the patches.

    Special tokens, which come first, stay. Queries may be of some of them alone; n is N otherwise.
    """
    cos, sin = rotation
    num_special = key.shape[-2] - cos.shape[-2]

    def rotate(states: torch.Tensor) -> torch.Tensor:
        special, patches = states.tensor_split([num_special], dim=-2)
        first, second = patches.chunk(2, dim=-1)
        patches = patches * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([special, patches.to(states.dtype)], dim=-2)  # angles are in float32

    return query if query.shape[-2] <= num_special else rotate(query), rotate(key)


def leave_unrotated(query: torch.Tensor, key: torch.Tensor, rotation: None) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands where `rotate_patches` would, for models without rotary positions."""
    return query, key
