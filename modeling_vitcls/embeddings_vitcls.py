"""From pixels to the token sequence: patches, special tokens, positions.

    pixel_values -> patches + positions -> [ CLS | distillation | registers | patches ] -> dropout -> norm

Learned and sin-cos positions are added here; rotary ones are in rotary_vitcls.py. What a token may see is decided in
scopes_vitcls.py, the encoder is in layers_vitcls.py.
"""

import math

import torch
from torch import nn

from .configuration_vitcls import ViTCLSConfig
from .linear_vitcls import PatchProjection
from .norms_vitcls import build_norm
from .resampling_vitcls import Resampling, needs_no_resampling


class ViTCLSEmbeddings(nn.Module):
    """Builds the token sequence. Groups without tokens have no parameter.

    Shapes: pixel_values [B, C, H, W] -> [B, N, D], N = special tokens + rows * columns of patches.
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.patch_embeddings = ViTCLSPatchEmbeddings(config)
        self.position_embeddings = POSITION_EMBEDDINGS[config.position_embedding_type](config)
        self.cls_token = _token_parameter(config.num_cls_tokens, config.hidden_size)
        self.distillation_token = _token_parameter(config.num_distillation_tokens, config.hidden_size)
        self.register_tokens = _token_parameter(config.num_register_tokens, config.hidden_size)
        self.mask_token = _token_parameter(int(config.use_mask_token), config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = build_norm(config) if config.pre_norm else nn.Identity()

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Embed images; patches where `bool_masked_pos` [B, rows * columns] is true become the mask token.

        Raises:
            ValueError: for images that the model cannot take (see `ViTCLSPatchEmbeddings.grid_of`), or a mask that
                does not fit.
        """
        batch_size = pixel_values.shape[0]
        grid = self.patch_embeddings.grid_of(pixel_values)
        patches = self.patch_embeddings(pixel_values)  # [B, rows * columns, D]
        patches = self.mask(patches, bool_masked_pos)
        special, patches = self.position_embeddings(self.special_tokens(), patches, grid)
        tokens = torch.cat([*(token.expand(batch_size, -1, -1) for token in special), patches], dim=1)  # [B, N, D]
        return self.norm(self.dropout(tokens))

    def special_tokens(self) -> dict[str, nn.Parameter]:
        """The learned tokens [1, n, D] of the groups that exist, in the order of the sequence."""
        groups = {"cls": self.cls_token, "distillation": self.distillation_token, "registers": self.register_tokens}
        return {name: token for name, token in groups.items() if token is not None}

    def mask(self, patches: torch.Tensor, bool_masked_pos: torch.Tensor | None) -> torch.Tensor:
        """Put the mask token in place of masked patches."""
        if bool_masked_pos is None:
            if self.mask_token is None or not self.training:
                return patches
            # Distributed training wants every parameter to take part.
            bool_masked_pos = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
        if self.mask_token is None:
            raise ValueError("bool_masked_pos was given and the model has no mask token: set use_mask_token=True")
        if bool_masked_pos.shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)} and the images give "
                f"{tuple(patches.shape[:2])} patches [batch, patches]: make them equal"
            )
        return torch.where(bool_masked_pos.bool().unsqueeze(-1), self.mask_token.to(patches.dtype), patches)


class ViTCLSPatchEmbeddings(nn.Module):
    """Cuts images into patches and projects each. Pixels beyond the last whole patch are left out.

    Shapes: [B, C, H, W] -> [B, rows * columns, D], row by row.
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_height_width
        self.projection = PatchProjection(
            config.num_channels,
            config.hidden_size,
            kernel_size=self.patch_size,
            stride=self.patch_size,
            bias=config.patch_bias,
        )
        self.norm = build_norm(config) if config.patch_norm else nn.Identity()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Project the patches of images that `grid_of` accepts."""
        return self.norm(self.projection(pixel_values).flatten(2).transpose(1, 2))  # [B, rows * columns, D]

    def grid_of(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of patches in these images.

        Raises:
            ValueError: if they are no batch of images, have another number of channels, or are smaller than a patch.
        """
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: give [batch, channels, height, width]"
            )
        _, channels, height, width = pixel_values.shape
        if channels != self.num_channels:
            raise ValueError(
                f"pixel_values has {channels} channel(s) and the model takes {self.num_channels}: convert the images, "
                f"or build the model with num_channels={channels}"
            )
        patch_height, patch_width = self.patch_size
        if height < patch_height or width < patch_width:
            raise ValueError(
                f"the images are {height} x {width} pixels, smaller than one patch of {patch_height} x {patch_width}: "
                "enlarge them"
            )
        return height // patch_height, width // patch_width


Embedded = tuple[list[torch.Tensor], torch.Tensor]  # special tokens by group [1, n, D], patches [B, rows * columns, D]


class LearnedPositions(nn.Module):
    """A learned vector for each place of the grid, and for the special tokens that the configuration names.

    For images of another size the grid is resampled (ViT, arXiv 2010.11929, section 3.2).
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.grid = config.grid_size
        self.resample = Resampling(config.position_interpolation, config.position_antialias, config.position_offset)
        has_cls_position = config.position_embedding_tokens in ("cls", "all")
        has_all_positions = config.position_embedding_tokens == "all"
        width = config.hidden_size
        self.cls = _token_parameter(config.num_cls_tokens * has_cls_position, width)
        self.distillation = _token_parameter(config.num_distillation_tokens * has_all_positions, width)
        self.registers = _token_parameter(config.num_register_tokens * has_all_positions, width)
        self.patches = nn.Parameter(torch.empty(1, math.prod(self.grid), width))

    def forward(self, special: dict[str, nn.Parameter], patches: torch.Tensor, grid: tuple[int, int]) -> Embedded:
        """Add positions to the special tokens that have them, and to the patches."""
        positions: torch.Tensor = self.patches
        if not needs_no_resampling(self.grid, grid):
            positions = self.resample(self.patches, self.grid, grid)
        return [self.add_to_special(name, token) for name, token in special.items()], patches + positions

    def add_to_special(self, name: str, token: torch.Tensor) -> torch.Tensor:
        """The tokens [1, n, D] of the group `name` with their positions, if the group has any."""
        positions = getattr(self, name)
        return token if positions is None else token + positions


class SinCosPositions(nn.Module):
    """Fixed sine-cosine positions of the patches, [sin x, cos x, sin y, cos y] (MoCo v3, arXiv 2104.02057)."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size

    def forward(self, special: dict[str, nn.Parameter], patches: torch.Tensor, grid: tuple[int, int]) -> Embedded:
        """Add positions to the patches; special tokens have no place in the image."""
        rows, columns = grid
        y = torch.arange(rows, dtype=torch.float32, device=patches.device)
        x = torch.arange(columns, dtype=torch.float32, device=patches.device)
        y, x = torch.meshgrid(y, x, indexing="ij")  # [rows, columns] each
        quarter = self.hidden_size // 4
        frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float32, device=patches.device) / quarter)
        x_angles = x.flatten()[:, None] * frequencies  # [N, D / 4]
        y_angles = y.flatten()[:, None] * frequencies
        positions = torch.cat([x_angles.sin(), x_angles.cos(), y_angles.sin(), y_angles.cos()], dim=-1)  # [N, D]
        return list(special.values()), patches + positions.to(patches.dtype)


class NoAddedPositions(nn.Module):
    """Nothing is added to the tokens: positions are rotary, or there are none."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()

    def forward(self, special: dict[str, nn.Parameter], patches: torch.Tensor, grid: tuple[int, int]) -> Embedded:
        """Return the tokens as they are."""
        return list(special.values()), patches


POSITION_EMBEDDINGS: dict[str, type[LearnedPositions | SinCosPositions | NoAddedPositions]] = {
    "learned": LearnedPositions,
    "sincos_2d": SinCosPositions,
    "learned_rope_2d": LearnedPositions,
    "learned_rope_mixed": LearnedPositions,
    "rope_2d": NoAddedPositions,
    "rope_mixed": NoAddedPositions,
    "none": NoAddedPositions,
}


def _token_parameter(count: int, width: int) -> nn.Parameter | None:
    """A parameter [1, count, width], filled by `_init_weights`; None for no tokens."""
    return nn.Parameter(torch.empty(1, count, width)) if count else None
