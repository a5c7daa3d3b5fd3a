"""Which pictures make which batch: a function of the seed and the step, so nothing about it has to be saved.

The training pictures are shuffled anew for each epoch (ordering.py) and laid end to end. Each optimiser step takes the
next `batch size x accumulation steps x processes` of them, and each process its share:

    epoch 0 ............ | epoch 1 ............ | ...
    step 0 | step 1 | step 2 | step 3 | ...

So all batches are of one size, every picture is seen equally often, and one process with batches of 16 sees what two
see with batches of 8, or what accumulation makes of two batches of 8. With repeated augmentation a step takes fewer
pictures, and shows all of them, then all of them again.

A batch is a dict:
    pixels [B, C, H, W] `uint8`    augmented, of the model's size
    labels                         by kind (labels.py)
    index  [B] `int64`             the picture
    epoch  [B] `int64`             how many times it was shown before
    view   [B] `int64`             which of its augmented views: `epoch`, or its remainder where views recur
    broken [B] `int64`             index of a picture that cannot be read and that this one stands in for, else -1
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


KEPT_BYTES = 256 * 2**20  # pictures are decoded once and kept where all fit into this, per worker

Key = tuple[int, int]  # epoch, index of the picture
Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The arithmetic of a run, and the pictures of every batch."""

    num_pictures: int | None  # None for a stream, whose order is its own (streaming.py)
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
        """`max_steps`, or as many steps as show every picture `epochs` times (rounded up).

        Args:
            num_pictures: None for a stream.
            labels: the pictures' classes, for `class_balance="sampling"`.
            copies: of each picture in a step (`--repeated-augmentation`).

        Raises:
            ValueError: for a stream without `max_steps` or with balanced classes, or copies that do not fit a step.
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
        """Over all processes and accumulated batches, copies included."""
        return self.batch_size * self.accumulation_steps * self.num_processes

    def epochs_after(self, step: int) -> float:
        """Times that each picture has been seen after `step` steps; 0 for a stream, where that is not known."""
        return step * self.pictures_per_step / self.num_pictures if self.num_pictures else 0.0

    def batches(self, process: int, first_step: int = 0) -> Iterator[list[Key]]:
        """The batches of one process from a step on, `accumulation_steps` of them per step."""
        for step in range(first_step, self.num_steps):
            for accumulated in range(self.accumulation_steps):
                start = (accumulated * self.num_processes + process) * self.batch_size
                yield [self.key(step, place) for place in range(start, start + self.batch_size)]

    def key(self, step: int, place: int) -> Key:
        """The picture at a place of a step."""
        assert self.order is not None and self.num_pictures is not None, "a stream has its own order"
        different = self.pictures_per_step // self.copies
        copy, offset = divmod(place, different)
        number, at = divmod(step * different + offset, self.num_pictures)
        shown, indices = self.order.epoch(number)
        return int(shown[at]) * self.copies + copy, int(indices[at])


def steps_for(epochs: float, num_pictures: int | None, per_step: int) -> int:
    """Steps that show every picture `epochs` times."""
    if num_pictures is None:
        raise ValueError("a streamed data set has no known end: say with --max-steps how long to train")
    return math.ceil(epochs * num_pictures / per_step)


def build_order(num_pictures: int | None, options: TrainingOptions, labels: Sequence[int] | None) -> Order | None:
    """The order of stored pictures; None for a stream."""
    if options.class_balance == "sampling":
        if labels is None:
            raise ValueError("--class-balance sampling needs to know all labels, one per image: leave it out")
        return BalancedOrder(labels, options.seed)
    return None if num_pictures is None else PlainOrder(num_pictures, options.seed)


# Pictures ------------------------------------------------------------------------------------------------------------


class Preparation:
    """Decoded pictures -> batches: what training on stored and on streamed pictures shares.

    What augmentation does to a picture is decided by (seed, view, index), whichever process or worker prepares it.
    """

    def __init__(
        self, augmentation: Augmentation, to_rgb: bool, seed: int, views: int = 0, num_channels: int | None = None
    ) -> None:
        """`num_channels`: the model's; pictures of another number cannot be used. None where they are all alike."""
        self.augmentation = augmentation
        self.to_rgb = to_rgb
        self.num_channels = num_channels
        self.seed = seed
        self.views = views

    def fixed_part(self, picture: Any) -> torch.Tensor:
        """A PIL image before anything random happens to it: [C, H, W] `uint8`.

        Raises:
            BrokenPicture: if its values cannot be used.
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
        """The batch of pictures after their fixed part; a tensor where all are of one size."""
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
    """Labels of one kind -> [B] `int64`, [B, classes] `float32`, or {task: [B] `int64`}."""
    if isinstance(labels[0], dict):
        return {task: torch.tensor([label[task] for label in labels]) for task in labels[0]}
    return torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], list) else torch.int64)


class TrainingPictures(Dataset):
    """Augmented training pictures by (epoch, index).

    A picture that cannot be read is replaced by the next one that can, by index.
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
        """`views`: how many augmented views of a picture there are; 0 makes a new one for each epoch."""
        self.source = source
        self.preparation = Preparation(augmentation, to_rgb, seed, views, num_channels)
        self.kept: dict[int, torch.Tensor] = {}
        self.broken: set[int] = set()
        self.together = kept_arrays(source, augmentation)  # [pictures, 1, H, W]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Batch:
        """A batch of one picture, without the batch dimension."""
        return {
            name: {task: part[0] for task, part in value.items()} if isinstance(value, dict) else value[0]
            for name, value in self.batch([key]).items()
        }

    def keys(self, plan: BatchPlan, process: int, first_step: int) -> Iterator[list[Key]]:
        """The batches of one process from a step on."""
        return plan.batches(process, first_step)

    def batch(self, keys: list[Key]) -> Batch:
        """The batch of these pictures.

        Raises:
            ValueError: if no picture can be read.
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
        """The same where all pictures are in memory as one tensor, and none can be broken."""
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
        """The first picture from `index` on that can be read: its index, and its fixed part."""
        for candidate in (*range(index, len(self.source)), *range(index)):
            if candidate not in self.broken:
                try:
                    return candidate, self.fixed_part(candidate)
                except BrokenPicture:
                    self.broken.add(candidate)
        raise ValueError(f"none of the {len(self.source)} images can be read, such as this: {self.describe(index)}")

    def fixed_part(self, index: int) -> torch.Tensor:
        """The picture before anything random, from memory where it was kept."""
        if index in self.kept:
            return self.kept[index]
        pixels = self.preparation.fixed_part(self.source.pictures[index])
        if pixels.nbytes * len(self.source) <= KEPT_BYTES:
            self.kept[index] = pixels
        return pixels

    def describe(self, index: int) -> str:
        """What is wrong with a broken picture."""
        try:
            self.preparation.fixed_part(self.source.pictures[index])
        except BrokenPicture as error:
            return str(error)
        return f"image {index} could not be read at first"


def kept_arrays(source: LabelledPictures, augmentation: Augmentation) -> torch.Tensor | None:
    """The fixed part of all pictures, [pictures, 1, H, W] `uint8`, where they are arrays and all fit into memory."""
    pictures: Any = source.pictures
    arrays = pictures.elements if isinstance(pictures, Chosen) else pictures
    if not isinstance(arrays, Arrays):
        return None
    values = arrays.values[pictures.indices] if isinstance(pictures, Chosen) else arrays.values
    pixels = torch.from_numpy(np.array(values))[:, None]  # [pictures, 1, H, W]
    if augmentation.fixed(pixels[:1]).nbytes * len(pixels) > KEPT_BYTES:
        return None
    return torch.cat([augmentation.fixed(part) for part in pixels.split(1024)])


# Batches -------------------------------------------------------------------------------------------------------------


class Pictures(Protocol):
    """What batches are made of: `TrainingPictures`, or the `TrainingStream` of streaming.py."""

    def keys(self, plan: BatchPlan, process: int, first_step: int) -> Iterator[list[Any]]:
        """What stands for the pictures of each batch of one process, from a step on; asked for in the main process."""

    def batch(self, keys: list[Any]) -> Batch:
        """The batch; asked for in workers."""


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
    """Batches by their keys, in the form that DataLoader's workers ask for."""

    pictures: Pictures

    def __getitem__(self, keys: Any) -> Batch:
        return self.pictures.batch(keys)


def training_batches(
    pictures: Pictures, plan: BatchPlan, process: int, num_workers: int, first_step: int = 0
) -> Generator[Batch, None, None]:
    """The batches of one process from a step on, on the CPU. Close the iterator to end its workers.

    Raises:
        ValueError: if no picture can be read, or a stream's example has no label.
    """
    keys = PlannedKeys(pictures, plan, process, first_step)
    yield from from_workers(PreparedBatches(pictures), keys, num_workers)


class Normaliser:
    """Pixels of 0 to 255 -> the image processor's `pixel_values`, for whole batches."""

    def __init__(self, processor: Any, device: torch.device) -> None:
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean = processor.image_mean if processor.do_normalize else 0.0
        std = processor.image_std if processor.do_normalize else 1.0
        self.scale = factor / per_channel(std, device)  # [C or 1, 1, 1]
        self.offset = per_channel(mean, device) / per_channel(std, device)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] `uint8` or `float32` -> `float32`."""
        return pixels * self.scale - self.offset


def per_channel(values: Any, device: torch.device) -> torch.Tensor:
    """One number or one per channel -> [C or 1, 1, 1]."""
    return torch.as_tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1)
