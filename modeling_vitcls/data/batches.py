"""Batches of training images. Their contents depend only on the seed and the step, so no state is saved.

The training images are shuffled for each epoch (ordering.py), and the epochs are concatenated. Each optimizer step
consumes the next `batch size x accumulation steps x processes` images, divided among the processes:

    epoch 0 ............ | epoch 1 ............ | ...
    step 0 | step 1 | step 2 | step 3 | ...

All batches have the same size, and every image is used equally often. One process with batches of 16, two processes
with batches of 8, and two accumulated batches of 8 use the same images per step. With repeated augmentation, a step
uses fewer different images, and repeats the whole sequence.

A batch is a dict:
    pixels [B, C, H, W] `uint8`    augmented, of the model's size
    labels                         by kind (labels.py)
    index  [B] `int64`             index of the image
    epoch  [B] `int64`             number of times that the image was used before
    view   [B] `int64`             index of its augmented view: `epoch`, modulo the number of views if it is limited
    broken [B] `int64`             index of the unreadable image that this image replaces, or -1
"""

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from ..image_processing_vitcls import pil_to_tensor
from ..options import TrainingOptions
from .augmentation import Augmentation
from .images import NO_PICTURE, Arrays, BrokenPicture, Chosen, LabelledPictures, check_channels
from .ordering import BalancedOrder, Order, PlainOrder
from .random_bits import seed_for
from .workers import from_workers


KEPT_BYTES = 256 * 2**20  # maximum size of the cache of decoded images per worker, in bytes

Key = tuple[int, int]  # epoch, index of the image
Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The number of steps of a run, and the images of every batch."""

    num_pictures: int | None  # None for a stream, which has its own order (streaming.py)
    batch_size: int
    accumulation_steps: int
    num_processes: int
    num_steps: int
    seed: int
    copies: int
    order: Order | None

    @classmethod
    def from_options(
        cls,
        num_pictures: int | None,
        options: TrainingOptions,
        num_processes: int,
        labels: Sequence[int] | None = None,
        copies: int = 1,
    ) -> "BatchPlan":
        """Build a plan of `max_steps` steps, or of `epochs` epochs rounded up to whole steps.

        Args:
            num_pictures: number of training images; None for a stream.
            options: the training options.
            num_processes: number of processes.
            labels: class indices of the images, for `class_balance="sampling"`.
            copies: number of copies of each image in a step (`--repeated-augmentation`).

        Raises:
            ValueError: for a stream without `max_steps` or with balanced classes, or if `copies` does not divide the
                number of images per step.
        """
        per_step = options.batch_size * options.gradient_accumulation_steps * num_processes
        if per_step % copies:
            raise ValueError(
                f"--repeated-augmentation {copies} does not divide the {per_step} images of a step: choose another "
                "--batch-size"
            )
        return cls(
            num_pictures=num_pictures,
            batch_size=options.batch_size,
            accumulation_steps=options.gradient_accumulation_steps,
            num_processes=num_processes,
            num_steps=options.max_steps or steps_for(options.epochs, num_pictures, per_step),
            seed=options.seed,
            copies=copies,
            order=build_order(num_pictures, options, labels),
        )

    @property
    def pictures_per_step(self) -> int:
        """Number of images per step over all processes and accumulated batches, including copies."""
        return self.batch_size * self.accumulation_steps * self.num_processes

    def epochs_after(self, step: int) -> float:
        """Return the number of epochs after `step` steps; 0 for a stream, whose length is unknown."""
        return step * self.pictures_per_step / self.num_pictures if self.num_pictures else 0.0

    def batches(self, process: int, first_step: int = 0) -> Iterator[list[Key]]:
        """Yield the batches of one process from `first_step` on, `accumulation_steps` batches per step."""
        for step in range(first_step, self.num_steps):
            for accumulated in range(self.accumulation_steps):
                start = (accumulated * self.num_processes + process) * self.batch_size
                yield [self.key(step, position) for position in range(start, start + self.batch_size)]

    def key(self, step: int, position: int) -> Key:
        """Return the key of the image at a position in a step."""
        assert self.order is not None and self.num_pictures is not None, "a stream has its own order"
        different = self.pictures_per_step // self.copies
        copy, offset = divmod(position, different)
        number, at = divmod(step * different + offset, self.num_pictures)
        shown, indices = self.order.epoch(number)
        return int(shown[at]) * self.copies + copy, int(indices[at])


def steps_for(epochs: float, num_pictures: int | None, per_step: int) -> int:
    """Return the number of steps of `epochs` epochs, rounded up."""
    if num_pictures is None:
        raise ValueError("a stream of unknown length requires a number of steps. Set --max-steps")
    return math.ceil(epochs * num_pictures / per_step)


def build_order(num_pictures: int | None, options: TrainingOptions, labels: Sequence[int] | None) -> Order | None:
    """Build the order of stored images; None for a stream."""
    if options.class_balance == "sampling":
        if labels is None:
            raise ValueError("--class-balance sampling needs to know all labels, one per image: leave it out")
        return BalancedOrder(labels, options.seed)
    return None if num_pictures is None else PlainOrder(num_pictures, options.seed)


# Images --------------------------------------------------------------------------------------------------------------


class Preparation:
    """Build batches from decoded images, both stored and streamed.

    The augmentation of an image depends only on (seed, view, index), not on the process or worker that prepares it.
    """

    def __init__(
        self, augmentation: Augmentation, to_rgb: bool, seed: int, views: int = 0, num_channels: int | None = None
    ) -> None:
        """`num_channels`: number of channels that the model requires; None skips the check of each image."""
        self.augmentation = augmentation
        self.to_rgb = to_rgb
        self.num_channels = num_channels
        self.seed = seed
        self.views = views

    def fixed_part(self, picture: Any) -> torch.Tensor:
        """Return a PIL image after the fixed part of the augmentation: [C, H, W] `uint8`.

        Raises:
            BrokenPicture: if its mode or number of channels is not supported.
        """
        try:
            pixels = pil_to_tensor(picture, self.to_rgb)
        except ValueError as error:
            raise BrokenPicture(str(error)) from error
        check_channels(picture, pixels, self.num_channels)
        return self.augmentation.fixed(pixels)

    def batch(
        self, pixels: torch.Tensor | list[torch.Tensor], labels: list[Any], keys: list[Key], broken: list[int]
    ) -> Batch:
        """Return a batch of images that have been through the fixed part.

        Args:
            pixels: the images; a tensor [B, C, H, W] if all have the same size.
            labels: the label of each image.
            keys: the epoch and index of each image.
            broken: index of the unreadable image that each image replaces, or -1.
        """
        epochs, indices = (np.array(part, dtype=np.int64) for part in zip(*keys, strict=True))
        views = epochs % self.views if self.views else epochs
        seed_of = {view: seed_for(self.seed, view) for view in set(views.tolist())}
        seeds = np.array([seed_of[view] for view in views.tolist()], dtype=np.uint64)
        return {
            "pixels": self.augmentation(pixels, seeds, indices.astype(np.uint64)),
            "labels": collated(labels),
            "index": torch.from_numpy(indices),
            "epoch": torch.from_numpy(epochs),
            "view": torch.from_numpy(views),
            "broken": torch.tensor(broken),
        }


def collated(labels: list[Any]) -> Any:
    """Return labels as [B] `int64`, [B, classes] `float32`, or {task: [B] `int64`}, by kind."""
    if isinstance(labels[0], dict):
        return {task: torch.tensor([label[task] for label in labels]) for task in labels[0]}
    return torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], list) else torch.int64)


class TrainingPictures(Dataset):
    """Augmented training images by (epoch, index).

    An unreadable image is replaced by the readable image with the next index.
    """

    def __init__(
        self,
        source: LabelledPictures,
        augmentation: Augmentation,
        to_rgb: bool,
        seed: int,
        views: int = 0,
        num_channels: int | None = None,
    ) -> None:
        """`views`: number of augmented views of each image; 0 makes a new view for each epoch."""
        self.source = source
        self.preparation = Preparation(augmentation, to_rgb, seed, views, num_channels)
        self.kept: dict[int, torch.Tensor] = {}
        self.broken: set[int] = set()
        self.together = kept_arrays(source, augmentation)  # [images, 1, H, W]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Batch:
        """Return one image and its labels, without the batch dimension."""
        return {
            name: {task: part[0] for task, part in value.items()} if isinstance(value, dict) else value[0]
            for name, value in self.batch([key]).items()
        }

    def keys(self, plan: BatchPlan, process: int, first_step: int) -> Iterator[list[Key]]:
        """Return the keys of each batch of one process from `first_step` on."""
        return plan.batches(process, first_step)

    def batch(self, keys: list[Key]) -> Batch:
        """Return the batch of the images with these keys.

        Raises:
            ValueError: if no image can be read.
        """
        if self.together is not None:
            return self.batch_of_arrays(keys)
        wanted = [index for _, index in keys]
        indices, pixels = zip(*(self.readable(index) for index in wanted), strict=True)
        return self.preparation.batch(
            list(pixels),
            [self.source.labels[index] for index in indices],
            [(epoch, index) for (epoch, _), index in zip(keys, indices, strict=True)],
            [NO_PICTURE if index == asked else asked for index, asked in zip(indices, wanted, strict=True)],
        )

    def batch_of_arrays(self, keys: list[Key]) -> Batch:
        """Return the batch if all images are in memory as one tensor, so that every image is readable."""
        assert self.together is not None
        indices = [index for _, index in keys]
        pixels = self.together[indices]  # [B, 1, H, W]
        channels = 3 if self.preparation.to_rgb else 1
        if self.preparation.augmentation.each is not None:
            pixels = pixels.expand(-1, channels, -1, -1)
        labels = [self.source.labels[index] for index in indices]
        batch = self.preparation.batch(pixels, labels, keys, [NO_PICTURE] * len(keys))
        return batch | {"pixels": batch["pixels"].expand(-1, channels, -1, -1)}

    def readable(self, index: int) -> tuple[int, torch.Tensor]:
        """Return the index and the fixed part of the first readable image from `index` on."""
        for candidate in (*range(index, len(self.source)), *range(index)):
            if candidate not in self.broken:
                try:
                    return candidate, self.fixed_part(candidate)
                except BrokenPicture:
                    self.broken.add(candidate)
        raise ValueError(f"none of the {len(self.source)} images can be read, such as this: {self.describe(index)}")

    def fixed_part(self, index: int) -> torch.Tensor:
        """Return the image after the fixed part of the augmentation, from the cache if possible."""
        if index in self.kept:
            return self.kept[index]
        pixels = self.preparation.fixed_part(self.source.pictures[index])
        if pixels.nbytes * len(self.source) <= KEPT_BYTES:
            self.kept[index] = pixels
        return pixels

    def describe(self, index: int) -> str:
        """Return the error message of an unreadable image."""
        try:
            self.preparation.fixed_part(self.source.pictures[index])
        except BrokenPicture as error:
            return str(error)
        return f"image {index} could not be read at first"


def kept_arrays(source: LabelledPictures, augmentation: Augmentation) -> torch.Tensor | None:
    """Return the fixed part of all images, [images, 1, H, W] `uint8`; None if they are not arrays or do not fit."""
    pictures: Any = source.pictures
    arrays = pictures.elements if isinstance(pictures, Chosen) else pictures
    if not isinstance(arrays, Arrays):
        return None
    values = arrays.values[pictures.indices] if isinstance(pictures, Chosen) else arrays.values
    pixels = torch.from_numpy(np.array(values))[:, None]  # [images, 1, H, W]
    if augmentation.fixed(pixels[:1]).nbytes * len(pixels) > KEPT_BYTES:
        return None
    return torch.cat([augmentation.fixed(part) for part in pixels.split(1024)])


# Batches -------------------------------------------------------------------------------------------------------------


class Pictures(Protocol):
    """Interface of `TrainingPictures` and of `TrainingStream` in streaming.py."""

    def keys(self, plan: BatchPlan, process: int, first_step: int) -> Iterator[list[Any]]:
        """Return the keys of each batch of one process from `first_step` on. Called in the main process."""

    def batch(self, keys: list[Any]) -> Batch:
        """Return the batch with these keys. Called in workers."""


@dataclass(frozen=True)
class PlannedKeys:
    """The keys of one process's batches, in the form of a sampler."""

    pictures: Pictures
    plan: BatchPlan
    process: int
    first_step: int

    def __iter__(self) -> Iterator[list[Any]]:
        return self.pictures.keys(self.plan, self.process, self.first_step)


@dataclass(frozen=True)
class PreparedBatches(Dataset):
    """Batches by their keys, as a dataset for DataLoader."""

    pictures: Pictures

    def __getitem__(self, keys: Any) -> Batch:
        return self.pictures.batch(keys)


def training_batches(
    pictures: Pictures, plan: BatchPlan, process: int, num_workers: int, first_step: int = 0
) -> Generator[Batch, None, None]:
    """Yield the batches of one process from `first_step` on, on the CPU. Close the iterator to stop its workers.

    Raises:
        ValueError: if no image can be read, or an example of a stream has no label.
    """
    keys = PlannedKeys(pictures, plan, process, first_step)
    yield from from_workers(PreparedBatches(pictures), keys, num_workers)


class Normaliser:
    """Convert batches of pixels from 0 to 255 to the `pixel_values` of the image processor."""

    def __init__(self, processor: Any, device: torch.device) -> None:
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean = processor.image_mean if processor.do_normalize else 0.0
        std = processor.image_std if processor.do_normalize else 1.0
        self.scale = factor / per_channel(std, device)  # [C or 1, 1, 1]
        self.offset = per_channel(mean, device) / per_channel(std, device)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return pixels [B, C, H, W], `uint8` or `float32`, rescaled and normalized as `float32`."""
        return pixels * self.scale - self.offset


def per_channel(values: Any, device: torch.device) -> torch.Tensor:
    """Return one number, or one number per channel, as a tensor [C or 1, 1, 1]."""
    return torch.as_tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1)
