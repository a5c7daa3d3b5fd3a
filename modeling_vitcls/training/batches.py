"""Which pictures make which batch: a function of the seed and the step, so nothing about it has to be saved.

The training pictures are shuffled anew for each epoch and laid end to end. Each optimiser step takes the next
`batch size x accumulation steps x processes` of them, and each process its share:

    epoch 0 ............ | epoch 1 ............ | ...
    step 0 | step 1 | step 2 | step 3 | ...

So all batches are of one size, every picture is seen equally often, and one process with batches of 16 sees what two
see with batches of 8, or what accumulation makes of two batches of 8.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..image_processing_vitcls import picture_to_pixels
from .augmentation import Augmentation, seeded
from .data import LabelledPictures
from .options import TrainingOptions


KEPT_BYTES = 256 * 2**20  # pictures are decoded once and kept where all fit into this, per worker

Key = tuple[int, int]  # epoch, index of the picture


def seed_for(*parts: int) -> int:
    """One 64-bit seed from several numbers of 0 or more; different parts give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class BatchPlan:
    """The arithmetic of a run, and the pictures of every batch."""

    num_pictures: int
    batch_size: int
    accumulation_steps: int
    num_processes: int
    num_steps: int
    seed: int

    @classmethod
    def from_options(cls, num_pictures: int, options: TrainingOptions, num_processes: int) -> "BatchPlan":
        """`max_steps`, or as many steps as show every picture `epochs` times (rounded up)."""
        per_step = options.batch_size * options.gradient_accumulation_steps * num_processes
        num_steps = options.max_steps or math.ceil(options.epochs * num_pictures / per_step)
        return cls(
            num_pictures=num_pictures,
            batch_size=options.batch_size,
            accumulation_steps=options.gradient_accumulation_steps,
            num_processes=num_processes,
            num_steps=num_steps,
            seed=options.seed,
        )

    @property
    def pictures_per_step(self) -> int:
        """Over all processes and accumulated batches."""
        return self.batch_size * self.accumulation_steps * self.num_processes

    def epochs_after(self, step: int) -> float:
        """Times that each picture has been seen after `step` steps."""
        return step * self.pictures_per_step / self.num_pictures

    def batches(self, process: int, first_step: int = 0) -> Iterator[list[Key]]:
        """The batches of one process from a step on, `accumulation_steps` of them per step."""
        for step in range(first_step, self.num_steps):
            for accumulated in range(self.accumulation_steps):
                place = accumulated * self.num_processes + process
                start = step * self.pictures_per_step + place * self.batch_size
                yield [self.key(position) for position in range(start, start + self.batch_size)]

    def key(self, position: int) -> Key:
        """The picture at a position of the endless sequence."""
        epoch, place = divmod(position, self.num_pictures)
        return epoch, epoch_order(self.num_pictures, self.seed, epoch)[place]


@lru_cache(maxsize=2)  # a batch touches one epoch, or two at their seam
def epoch_order(num_pictures: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch."""
    generator = torch.Generator().manual_seed(seed_for(seed, epoch))
    return torch.randperm(num_pictures, generator=generator).tolist()


class TrainingPictures(Dataset):
    """Augmented training pictures by (epoch, index): `pixels` [C, H, W] `uint8` and `labels`.

    What augmentation does is decided by (seed, epoch, index), whichever process or worker prepares the picture.
    """

    def __init__(self, source: LabelledPictures, augmentation: Augmentation, to_rgb: bool, seed: int) -> None:
        self.source = source
        self.augmentation = augmentation
        self.to_rgb = to_rgb
        self.seed = seed
        self.kept: dict[int, torch.Tensor] = {}

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        pixels = seeded(self.augmentation.random, self.fixed_part(index), seed_for(self.seed, epoch, index))
        return {"pixels": pixels, "labels": self.source.labels[index]}

    def fixed_part(self, index: int) -> torch.Tensor:
        """The picture before anything random, from memory where it was kept."""
        if index in self.kept:
            return self.kept[index]
        pixels = picture_to_pixels(self.source.pictures[index], self.to_rgb)
        pixels = self.augmentation.fixed(pixels).contiguous()
        if pixels.nbytes * len(self.source) <= KEPT_BYTES:
            self.kept[index] = pixels
        return pixels


def training_batches(
    pictures: TrainingPictures, plan: BatchPlan, process: int, num_workers: int, first_step: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of one process: `pixels` [B, C, H, W] `uint8` and `labels` [B], on the CPU."""
    return iter(
        DataLoader(
            pictures,
            batch_sampler=PlannedBatches(plan, process, first_step),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )
    )


@dataclass(frozen=True)
class PlannedBatches:
    """The plan in the form that DataLoader iterates over."""

    plan: BatchPlan
    process: int
    first_step: int

    def __iter__(self) -> Iterator[list[Key]]:
        return self.plan.batches(self.process, self.first_step)


class Normaliser:
    """8-bit pixels -> the image processor's `pixel_values`, for whole batches."""

    def __init__(self, processor: Any, device: torch.device) -> None:
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean = processor.image_mean if processor.do_normalize else 0.0
        std = processor.image_std if processor.do_normalize else 1.0
        self.scale = factor / per_channel(std, device)  # [C or 1, 1, 1]
        self.offset = per_channel(mean, device) / per_channel(std, device)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] `uint8` -> `float32`."""
        return pixels * self.scale - self.offset


def per_channel(values: Any, device: torch.device) -> torch.Tensor:
    """One number or one per channel -> [C or 1, 1, 1]."""
    return torch.as_tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1)
