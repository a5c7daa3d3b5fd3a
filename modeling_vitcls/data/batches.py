"""Batches of training images, loaded and augmented in DataLoader workers.

sampling.py selects the images.

A batch is a dict:
    pixels   [B, C, H, W] `uint8`    augmented images at the model's image size
    labels                           labels; the format depends on the kind of labels (labels.py)
    index    [B] `int64`             index of the image
    errors   {index: message}        error message of each unreadable image, which another image replaces
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..model.image_processing_vitcls import pil_to_tensor
from .augmentation import Transform, apply_seeded
from .images import LabeledImages, check_channels
from .labels import LabelSpace
from .sampling import BatchPlan, ImageKey, derive_seed
from .workers import load_batches


MAX_CACHE_BYTES = 256 * 2**20  # Maximum size of the cache of prepared images per worker, in bytes

Batch = dict[str, Any]


@dataclass
class TrainingImages:
    """Dataset of augmented training images.

    Each item is a batch; its index is a list of (epoch, image index) pairs. The augmentation of an
    image depends only on (seed, epoch, index), and not on the process or worker. An unreadable
    image is replaced with the next readable image.
    """

    source: LabeledImages
    fixed_transform: Transform  # Its outputs are cached
    random_transform: Transform
    label_space: LabelSpace
    to_rgb: bool  # Whether images are converted to three channels
    seed: int  # Seed of the augmentation
    bit_depth: int  # Number of bits that 16-bit images use
    num_channels: int  # Number of channels that the model requires
    cache: dict[int, Tensor] = field(default_factory=dict)  # Prepared images
    errors: dict[int, str] = field(default_factory=dict)  # Message of each unreadable image

    def __getitem__(self, keys: list[ImageKey]) -> Batch:
        """Build the batch for a list of keys. Raise ValueError if no image can be read."""
        epochs, wanted = zip(*keys, strict=True)
        indices, pixels = zip(*map(self.load_readable_image, wanted), strict=True)
        seeds = [derive_seed(self.seed, *key) for key in zip(epochs, indices, strict=True)]
        return {
            "pixels": apply_seeded(self.random_transform, pixels, seeds),
            "labels": self.label_space.collate([self.source.labels[index] for index in indices]),
            "index": torch.tensor(indices),
            "errors": {index: self.errors[index] for index in wanted if index in self.errors},
        }

    def load_readable_image(self, index: int) -> tuple[int, Tensor]:
        """Find the first readable image from `index` on; return its index and its pixels."""
        num_images = len(self.source)
        for number in range(index, index + num_images):
            candidate = number % num_images
            # A file that failed once is not opened again in every epoch.
            if candidate not in self.errors:
                try:
                    return candidate, self.load_pixels(candidate)
                except ValueError as error:
                    self.errors[candidate] = str(error)
        raise ValueError(
            f"none of the {num_images} images can be read. First error: {self.errors[index]}. "
            "Check the dataset"
        )

    def load_pixels(self, index: int) -> Tensor:
        """Apply the fixed transform to the `uint8` pixels [C, H, W] of an image, or take them from the cache.

        Raise ValueError if the image cannot be read, or its mode or number of channels is not supported.
        """
        if index in self.cache:
            return self.cache[index]
        image = self.source.images[index]
        pixels = pil_to_tensor(image, self.to_rgb, self.bit_depth, self.num_channels)
        check_channels(image, pixels, self.num_channels)
        pixels = self.fixed_transform(pixels)
        # All images or none: with a part of them, every batch would still wait for the rest.
        if pixels.nbytes * len(self.source) <= MAX_CACHE_BYTES:
            self.cache[index] = pixels
        return pixels


# Workers ------------------------------------------------------------------------------------------


def iterate_training_batches(
    dataset: TrainingImages,
    plan: BatchPlan,
    process_index: int,
    num_workers: int,
    first_step: int = 0,
) -> Generator[Batch, None, None]:
    """Yield the batches of one process, starting at `first_step`.

    Raise ValueError, without the worker's traceback, if no image can be read. Close the iterator to
    stop the workers.
    """
    try:
        yield from load_batches(
            dataset,
            num_workers,
            sampler=plan.iterate_keys(process_index, first_step),
            pin_memory=torch.cuda.is_available(),
        )
        return
    except ValueError as error:  # A worker puts its traceback before the message
        message = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        # The traceback references the iterator and would keep the workers alive
        error.__traceback__ = None
    raise ValueError(message)


class Normalizer:
    """Rescaling and normalization of pixels in [0, 255] with the settings of an image processor."""

    def __init__(self, processor: Any, device: torch.device) -> None:
        statistics = (
            (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        )
        mean, std = (
            torch.as_tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1)
            for values in statistics
        )
        self.scale = (
            processor.rescale_factor if processor.do_rescale else 1.0
        ) / std  # [1 or C, 1, 1]
        self.offset = mean / std

    def __call__(self, pixels: Tensor) -> Tensor:
        """Rescale and normalize pixels [B, C, H, W], `uint8` or `float32`; return `float32`."""
        return pixels * self.scale - self.offset

    def revert(self, pixel_values: Tensor) -> Tensor:
        """Compute the pixels [B, C, H, W] in [0, 255] of normalized images."""
        return (pixel_values + self.offset) / self.scale
