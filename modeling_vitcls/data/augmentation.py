"""Augmentation of training images.

    image -> fixed_transform: resize (cached) -> random_transform: crop, flip, rotation, ... -> pixels
    batch on the device -> build_mixer: mixup, CutMix

The transforms are torchvision's. They run on the CPU and process `uint8` pixels. Their random
numbers depend only on the seed of each image. Held-out images are preprocessed by the image
processor without augmentation. Pixels are rescaled and normalized on the model's device (batches.py).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from .aspect_ratio import get_output_size, resize_pixels
from .options import LARGEST_AUGMENT, AugmentationOptions


# Mean and standard deviation of the noise of random erasing, in gray levels (0 to 255)
NOISE_MEAN = 128.0
NOISE_STD = 64.0


# [C, H, W] `uint8` -> [C, H, W] `uint8`
Transform = Callable[[Tensor], Tensor]


def build_augmentation(options: AugmentationOptions, processor: Any) -> tuple[Transform, Transform]:
    """Build the augmentation for the input size of an image processor.

    Without random crops, images are resized as by the image processor.

    Returns:
        The fixed transform of an image, and the random one of its output, which draws from torch's
        default generator.
    """
    height_width = get_output_size(processor)
    fixed_transform = partial(resize_pixels, processor, options.crop_scale != 1)

    transforms: list[nn.Module] = []
    assert options.crop_scale is not None, "the defaults set it"
    if options.crop_scale < 1:
        transforms.append(
            v2.RandomResizedCrop(
                height_width, scale=(options.crop_scale, 1.0), interpolation=processor.resample
            )
        )
    if options.flip:
        transforms.append(v2.RandomHorizontalFlip())
    maxima = dict.fromkeys(LARGEST_AUGMENT, 0.0) | (options.augment or {})
    if maxima["rotation"] or maxima["shift"] or maxima["zoom"]:
        transforms.append(
            v2.RandomAffine(
                maxima["rotation"],
                translate=(maxima["shift"], maxima["shift"]),
                scale=(1 - maxima["zoom"], 1 + maxima["zoom"]),
                interpolation=InterpolationMode.BILINEAR,
            )
        )
    if options.auto_augment == "rand":
        # 9 of 30, and both operations always: another distribution than timm's `rand-m9`
        transforms.append(v2.RandAugment(magnitude=9, interpolation=InterpolationMode.BILINEAR))
    elif options.auto_augment == "trivial":
        transforms.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
    if maxima["random_erasing"]:
        erasing = v2.RandomErasing(maxima["random_erasing"], value="random")
        transforms.append(v2.Lambda(partial(erase, erasing)))
    return fixed_transform, nn.Sequential(*transforms)


def apply_seeded(transform: Transform, pixels: Sequence[Tensor], seeds: Sequence[int]) -> Tensor:
    """Apply a random transform to images of any sizes, each with a seed of its own: [B, C, H, W] `uint8`."""
    images = []
    # Restore the caller's random state.
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(pixels, seeds, strict=True):
            torch.default_generator.manual_seed(seed)
            images.append(transform(image))
    return torch.stack(images)


def erase(erasing: v2.RandomErasing, pixels: Tensor) -> Tensor:
    """Replace a random rectangle of an image [C, H, W] `uint8` with Gaussian noise around mid-gray.

    Source: Zhong et al. 2020, random erasing.
    """
    erased_pixels = erasing((pixels.float() - NOISE_MEAN) / NOISE_STD)
    return (erased_pixels * NOISE_STD + NOISE_MEAN).round().clamp(0, 255).to(torch.uint8)


def build_mixer(mixup: float, cutmix: float, num_classes: int) -> nn.Module:
    """Build mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), or one of them at random.

    Returns:
        A transform of pixels [B, C, H, W] and class indices [B] to pixels as floats from 0 to 255,
        and labels as probabilities [B, classes].
    """
    alphas = {v2.MixUp: mixup, v2.CutMix: cutmix}
    mixers = [
        method(alpha=alpha, num_classes=num_classes) for method, alpha in alphas.items() if alpha
    ]
    mixer = mixers[0] if len(mixers) == 1 else v2.RandomChoice(mixers)
    return v2.Compose([v2.ToDtype(torch.float32), mixer])
