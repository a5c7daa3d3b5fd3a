"""Augmentation of training images.

    image   -> fixed_transform: one image -> image_transform: one image -> batch_transform: a batch -> pixels
               resize (cached)               crop, RandAugment,            flip, rotation,
                                             erasing                       shift, zoom
    batch on the device -> BatchMixer: mixup, CutMix

The transforms run on the CPU and process `uint8` pixels. Their random numbers depend only on the
seed and the index of each image. Held-out images are preprocessed by the image processor without
augmentation. Pixels are rescaled and normalized on the model's device (batches.py).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from .aspect_ratio import ResizeTransform, get_output_size
from .options import AugmentationOptions
from .sampling import draw_random_bits


@dataclass(frozen=True)
class Augmentation:
    """The three transforms of an augmentation, in the order of application."""

    fixed_transform: nn.Module  # [C, H, W] `uint8` -> [C, H, W] `uint8`
    image_transform: nn.Module | None  # Random; uses torch's default generator; None: no transform
    batch_transform: "BatchTransform"

    def __call__(
        self, pixels: torch.Tensor | list[torch.Tensor], seeds: np.ndarray, indices: np.ndarray
    ) -> torch.Tensor:
        """Apply `image_transform` and `batch_transform`, and return images [B, C, H, W] `uint8`.

        Args:
            pixels: output of `fixed_transform` for each image; a tensor [B, C, H, W] if all images
                have the same size.
            seeds, indices: [B] `uint64`; the augmentation of an image depends only on its seed and
                index.
        """
        random_bits = draw_random_bits(seeds, indices, 1 + self.batch_transform.num_random_numbers)

        if self.image_transform is not None:
            transformed_images = []
            # The transforms of torchvision draw from the default generator, which is given back as
            # it was.
            with torch.random.fork_rng(devices=[]):
                for image, seed in zip(
                    pixels, (random_bits[:, 0] >> np.uint64(1)).tolist(), strict=True
                ):
                    torch.default_generator.manual_seed(seed)
                    transformed_images.append(self.image_transform(image))
            pixels = transformed_images

        if not isinstance(pixels, torch.Tensor):
            pixels = torch.stack(list(pixels))
        # In [0, 1): the upper 53 bits, as many as a double holds.
        return self.batch_transform(pixels, (random_bits[:, 1:] >> np.uint64(11)) * 2.0**-53)


def build_augmentation(options: AugmentationOptions, processor: Any) -> Augmentation:
    """Build the augmentation for the input size of an image processor.

    Without random crops, images are resized as by the image processor.
    """
    height_width = get_output_size(processor)
    fixed_transform = ResizeTransform(processor, keep_resolution=options.crop_scale != 1)

    transforms: list[nn.Module] = []
    assert options.crop_scale is not None, "the defaults set it"
    if options.crop_scale < 1:
        transforms.append(
            v2.RandomResizedCrop(
                height_width, scale=(options.crop_scale, 1.0), interpolation=processor.resample
            )
        )
    if options.auto_augment == "rand":
        # As in DeiT
        transforms.append(v2.RandAugment(magnitude=9, interpolation=InterpolationMode.BILINEAR))
    elif options.auto_augment == "trivial":
        transforms.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
    maxima = dict(options.augment or {})
    if probability := maxima.pop("random_erasing", 0):
        transforms.append(Erasing(probability))

    return Augmentation(
        fixed_transform,
        v2.Compose(transforms) if transforms else None,
        BatchTransform(options.flip, **maxima),
    )


class Erasing(nn.Module):
    """Random erasing (Zhong et al. 2020) with Gaussian noise around mid-gray."""

    # Mean and standard deviation of the noise, in gray levels (0 to 255)
    NOISE_MEAN = 128.0
    NOISE_STD = 64.0

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.erase = v2.RandomErasing(probability, value="random")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Erase a random rectangle of an image [C, H, W] `uint8`."""
        erased_pixels = self.erase((pixels.float() - self.NOISE_MEAN) / self.NOISE_STD)
        return (
            (erased_pixels * self.NOISE_STD + self.NOISE_MEAN).round().clamp(0, 255).to(torch.uint8)
        )


class BatchTransform:
    """Random flips, rotations, shifts and zooms of a batch, different for each image."""

    num_random_numbers = 5  # Number of random numbers per image

    def __init__(
        self, flip: bool, rotation: float = 0.0, shift: float = 0.0, zoom: float = 0.0
    ) -> None:
        self.flip = flip
        self.shift = shift
        self.zoom = zoom
        self.rotation = math.radians(rotation)

    def __call__(self, pixels: torch.Tensor, random_numbers: np.ndarray) -> torch.Tensor:
        """Transform the pixels [B, C, H, W] `uint8`.

        The random numbers are [B, 5] in [0, 1).
        """
        is_flipped = torch.from_numpy(random_numbers[:, 0] < 0.5) & self.flip  # [B]
        if not (self.rotation or self.shift or self.zoom):
            if not self.flip:
                return pixels
            return torch.where(is_flipped[:, None, None, None], pixels.flip(-1), pixels)

        num_channels, height, width = pixels.shape[1:]
        is_gray = torch.equal(pixels, pixels[:, :1].expand_as(pixels))
        if is_gray:  # Transform one channel
            pixels = pixels[:, :1]

        factors = torch.from_numpy(random_numbers[:, 1:] * 2 - 1).float()  # [B, 4], from -1 to 1
        angle, shift_x, shift_y, zoom = factors[:, :, None, None].unbind(1)  # [B, 1, 1] each
        scale = 1 + self.zoom * zoom
        cos = (self.rotation * angle).cos() / scale
        sin = (self.rotation * angle).sin() / scale

        # Coordinates of each output pixel, in pixels from the shifted center. Pixels outside the
        # input become black.
        x = torch.arange(width) - (width - 1) / 2 - shift_x * self.shift * width  # [B, 1, W]
        # [B, H, 1]
        y = torch.arange(height)[:, None] - (height - 1) / 2 - shift_y * self.shift * height

        sign = 1 - 2 * is_flipped[:, None, None].float()
        sampling_grid = torch.empty(len(pixels), height, width, 2)  # (x, y) from -1 to 1
        sampling_grid[..., 0] = (cos * sign * 2 / width) * x + (sin * sign * 2 / width) * y
        sampling_grid[..., 1] = (cos * 2 / height) * y - (sin * 2 / height) * x

        # [B, C, H, W]
        outputs = nn.functional.grid_sample(pixels.float(), sampling_grid, align_corners=False)
        return outputs.round_().to(torch.uint8).expand(-1, num_channels, -1, -1)


class BatchMixer:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019).

    Each batch uses one of the enabled methods at random.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        mixers: list[nn.Module] = []
        if mixup:
            mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix:
            mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
        self.mix = mixers[0] if len(mixers) == 1 else v2.RandomChoice(mixers)

    def __call__(
        self, pixels: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix pixels [B, C, H, W] and class indices [B].

        Return the pixels as floats from 0 to 255, and the labels as probabilities [B, classes].
        """
        return self.mix(pixels.float(), labels)
