"""Random changes of training pictures.

    picture -> fixed part (may be kept in memory) -> each: one by one -> together: whole batches -> pixels
               resize                                crop, RandAugment,   flip, rotation,
                                                     erasing              shift, zoom
    batch on the device -> BatchMixer: mixup, CutMix

All but mixing works on 8-bit pixels and is a function of each picture's own seed. Nothing random happens to held-out
pictures: those go through the image processor. Scaling and normalising are done on the model's device (batches.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from ..options import AugmentationOptions
from .random_bits import fractions, random_bits


@dataclass(frozen=True)
class Augmentation:
    """The three parts, in order."""

    fixed: nn.Module  # [C, H, W] `uint8` -> [C, H, W] `uint8`
    each: nn.Module | None  # the same, with torch's random numbers
    together: "Placement"

    def __call__(
        self, pixels: torch.Tensor | list[torch.Tensor], seeds: np.ndarray, indices: np.ndarray
    ) -> torch.Tensor:
        """Apply the random parts.

        Args:
            pixels: what `fixed` made of each picture; a tensor [B, C, H, W] where all are of one size.
            seeds, indices: [B] `uint64`; what happens to a picture is a function of its own two.

        Returns:
            [B, C, H, W] `uint8`.
        """
        bits = random_bits(seeds, indices, 1 + self.together.num_numbers)
        if self.each is not None:
            with torch.random.fork_rng(devices=[]):
                pixels = [
                    seeded(self.each, picture, seed)
                    for picture, seed in zip(pixels, (bits[:, 0] >> np.uint64(1)).tolist(), strict=True)
                ]
        if not isinstance(pixels, torch.Tensor):
            pixels = torch.stack(list(pixels))
        return self.together(pixels, fractions(bits[:, 1:]))


def build_augmentation(
    options: AugmentationOptions, height_width: tuple[int, int], interpolation: InterpolationMode
) -> Augmentation:
    """What `options` ask for, ending at `height_width` pixels."""
    fixed: nn.Module = nn.Identity()
    each: list[nn.Module] = []
    if options.crop_scale < 1:
        each.append(v2.RandomResizedCrop(height_width, scale=(options.crop_scale, 1.0), interpolation=interpolation))
    else:
        fixed = v2.Resize(height_width, interpolation=interpolation)
    if options.auto_augment != "none":
        each.append(AUTO_AUGMENTS[options.auto_augment](options))
    if options.random_erasing:
        each.append(Erasing(options.random_erasing))
    return Augmentation(fixed, v2.Compose(each) if each else None, Placement(options))


AUTO_AUGMENTS: dict[str, Callable[[AugmentationOptions], nn.Module]] = {
    "rand": lambda options: v2.RandAugment(
        options.rand_augment_operations, options.rand_augment_magnitude, interpolation=InterpolationMode.BILINEAR
    ),
    "trivial": lambda options: v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
}


def seeded(transform: nn.Module, pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """Apply a random transform whose outcome depends on `seed` alone. It leaves torch's generator changed."""
    torch.default_generator.manual_seed(seed)
    return transform(pixels)


class Erasing(nn.Module):
    """Random erasing (Zhong et al. 2020) with noise around mid-grey, which is what normalised pixels vary around."""

    MEAN, DEVIATION = 128.0, 64.0

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.erase = v2.RandomErasing(probability, value="random")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[C, H, W] `uint8` -> [C, H, W] `uint8`."""
        erased = self.erase((pixels.float() - self.MEAN) / self.DEVIATION)
        return (erased * self.DEVIATION + self.MEAN).round().clamp(0, 255).to(torch.uint8)


class Placement:
    """Flip, rotation, shift and zoom of a whole batch, each picture by its own numbers."""

    num_numbers = 5

    def __init__(self, options: AugmentationOptions) -> None:
        self.flip = options.flip
        self.rotation = math.radians(options.rotation)
        self.shift = options.shift
        self.zoom = options.zoom

    def __call__(self, pixels: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
        """Pixels [B, C, H, W] `uint8` and numbers [B, 5] of 0 to 1 -> pixels of the same shape."""
        flipped = torch.from_numpy(numbers[:, 0] < 0.5) & self.flip  # [B]
        if self.rotation or self.shift or self.zoom:
            return self.resampled(pixels, flipped, torch.from_numpy(numbers[:, 1:] * 2 - 1).float())
        if self.flip:
            return torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
        return pixels

    def resampled(self, pixels: torch.Tensor, flipped: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Rotate, shift and zoom about the centre, bilinearly, with black around; `numbers` are [B, 4] of -1 to 1."""
        height, width = pixels.shape[-2:]
        angle, right, down, zoom = numbers[:, :, None, None].unbind(1)  # [B, 1, 1] each
        scale = 1 + self.zoom * zoom
        cos, sin = (self.rotation * angle).cos() / scale, (self.rotation * angle).sin() / scale
        # From each pixel of the result, in pixels from the centre, back to where it comes from.
        x = torch.arange(width) - (width - 1) / 2 - right * self.shift * width  # [B, 1, W]
        y = (torch.arange(height) - (height - 1) / 2)[:, None] - down * self.shift * height  # [B, H, 1]
        mirrored = 1 - 2 * flipped[:, None, None].float()
        grid = torch.empty(len(pixels), height, width, 2)
        grid[..., 0] = (cos * mirrored * 2 / width) * x + (sin * mirrored * 2 / width) * y
        grid[..., 1] = (cos * 2 / height) * y - (sin * 2 / height) * x
        moved = nn.functional.grid_sample(pixels.float(), grid, align_corners=False)  # [B, C, H, W]
        return moved.round_().to(torch.uint8)


class BatchMixer:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), or one of them by chance, with torch's random numbers.

    Args:
        options: at least one of `mixup` and `cutmix` is above 0.
        num_classes: of single labels.
    """

    def __init__(self, options: AugmentationOptions, num_classes: int) -> None:
        mixers: list[nn.Module] = []
        if options.mixup:
            mixers.append(v2.MixUp(alpha=options.mixup, num_classes=num_classes))
        if options.cutmix:
            mixers.append(v2.CutMix(alpha=options.cutmix, num_classes=num_classes))
        self.mix = mixers[0] if len(mixers) == 1 else v2.RandomChoice(mixers)

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [B, C, H, W] and classes [B] -> float pixels of 0 to 255 and probabilities [B, classes]."""
        return self.mix(pixels.float(), labels)
