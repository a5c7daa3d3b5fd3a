"""How learned positions, patch kernels and decoded patches follow another grid, image size or patch size."""

import dataclasses

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Resampling:
    """How learned positions [1, rows * columns, D] follow another grid; in float32, then back to their dtype."""

    mode: str  # "bicubic", "bilinear" or "crop"
    antialias: bool
    offset: float  # DINOv2: the scale factor is (new + offset) / old, and may not be new / old exactly

    def __call__(self, positions: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
        """Resample from `grid` (rows, columns) to `new_grid`."""
        maps = positions.float().unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, rows, columns]
        maps = self.resize_and_cut(maps, new_grid) if self.mode == "crop" else self.resize(maps, new_grid)
        return maps.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)  # [1, new rows * new columns, D]

    def resize(self, maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """[1, D, rows, columns] -> [1, D, *size]."""
        rows, columns = maps.shape[-2:]
        target: dict = {"size": size}
        if self.offset:
            target = {"scale_factor": ((size[0] + self.offset) / rows, (size[1] + self.offset) / columns)}
        return nn.functional.interpolate(maps, **target, mode=self.mode, align_corners=False, antialias=self.antialias)

    def resize_and_cut(self, maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """To a square as long as the longer side, then its top left part (RADIO, arXiv 2312.06709)."""
        square = nn.functional.interpolate(maps, size=(max(size), max(size)), mode="bilinear", align_corners=False)
        rows, columns = (torch.arange(length, device=maps.device) for length in size)
        return square.index_select(2, rows).index_select(3, columns)  # slices would tie an exported graph to one shape


def needs_no_resampling(grid: tuple[int, int], new_grid: tuple[int, int]) -> bool:
    """Whether the grids are the same. Never where a graph for images of any size is exported: the answer would be
    baked in, and resampling to the same grid changes nothing.
    """
    if torch.compiler.is_exporting() and any(isinstance(size, torch.SymInt) for size in new_grid):
        return False
    return grid == new_grid


def resize_patch_kernel(kernel: torch.Tensor, new_size: tuple[int, int]) -> torch.Tensor:
    """A patch projection [D, C, height, width] for patches of another size (FlexiViT, arXiv 2212.08013, section 3.4).

    The new kernel gives a patch that was resized bilinearly the embedding that the old kernel gave the original:
    exactly where patches grow, as closely as possible where they shrink. With B the matrix of that resizing, it is
    the old kernel times the pseudo-inverse of B transposed. Computed in float64.
    """
    height, width = kernel.shape[-2:]
    basis = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)  # not every device has float64
    resized = nn.functional.interpolate(basis, size=new_size, mode="bilinear", align_corners=False)
    to_new = torch.linalg.pinv(resized.flatten(1))  # [new pixels, old pixels]: the pseudo-inverse of B transposed
    new_kernel = kernel.cpu().double().flatten(2) @ to_new.T  # [D, C, new pixels]
    return new_kernel.unflatten(2, new_size).to(device=kernel.device, dtype=kernel.dtype)


def resize_decoded_patches(weight: torch.Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> torch.Tensor:
    """Weight or bias [C * height * width, ...] of a layer that gives pixels, for patches of another size.

    The new layer gives the patch that the old one gave, resized bilinearly; in float32.
    """
    patches = (
        weight.float().reshape(weight.shape[0], -1).T.unflatten(1, (-1, *size))
    )  # [inputs or 1, C, height, width]
    patches = nn.functional.interpolate(patches, size=new_size, mode="bilinear", align_corners=False, antialias=True)
    return patches.flatten(1).T.reshape(-1, *weight.shape[1:]).to(weight.dtype)
