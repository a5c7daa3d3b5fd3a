"""Random changes of training pictures, by torchvision's v2 transforms, on 8-bit pixels [C, H, W].

    picture -> fixed part (may be kept in memory) -> random part -> pixels of the model's size

Nothing random happens to held-out pictures: those go through the image processor. Scaling and normalising are done
for whole batches, on the model's device (batches.py).
"""

from dataclasses import dataclass

import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from .options import AugmentationOptions


@dataclass(frozen=True)
class Augmentation:
    """The two parts; both [C, H, W] `uint8` -> [C, H, W] `uint8`."""

    fixed: nn.Module
    random: nn.Module


def build_augmentation(
    options: AugmentationOptions, height_width: tuple[int, int], interpolation: InterpolationMode
) -> Augmentation:
    """What `options` ask for, ending at `height_width` pixels."""
    steps: list[nn.Module] = []
    fixed: nn.Module = nn.Identity()
    if options.crop_scale < 1:
        steps.append(v2.RandomResizedCrop(height_width, scale=(options.crop_scale, 1.0), interpolation=interpolation))
    else:
        fixed = v2.Resize(height_width, interpolation=interpolation)
    if options.flip:
        steps.append(v2.RandomHorizontalFlip())
    if options.rotation or options.shift or options.zoom:
        steps.append(
            v2.RandomAffine(
                degrees=options.rotation,
                translate=(options.shift, options.shift),
                scale=(1 - options.zoom, 1 + options.zoom),
                interpolation=InterpolationMode.BILINEAR,
            )
        )
    return Augmentation(fixed, v2.Compose(steps) if steps else nn.Identity())


def seeded(transform: nn.Module, pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """Apply a random transform whose outcome depends on `seed` alone."""
    torch.default_generator.manual_seed(seed)
    return transform(pixels)
