"""Evaluation of a model on labelled images. Each image is counted exactly once on any number of processes.

    images -> images of this process -> pixel_values and labels -> model -> metrics over all processes

All processes run the same number of batches of the same size, as sharded models require. The images are distributed in
rounds of one batch per process, and the last round is padded with blank images, which have no labels and are not
counted. An unreadable image is replaced by a blank image, reported by name, and counted as unreadable.

The metrics are in metrics.py; evaluate.py evaluates a saved model and writes the results.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..data.images import BrokenPictures, LabelledPictures, check_channels
from ..data.labels import LabelKind, LabelSpace
from ..data.workers import leave_signals_to_parent
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..options import DataOptions
from .metrics import METRICS, scalars


KEPT_BYTES = 256 * 2**20  # maximum size of the cache of prepared images per process, in bytes
DECIMALS = 6


@dataclass
class HeldOutBatch:
    """One batch of a process: the readable images, and the error messages of unreadable images."""

    pixel_values: torch.Tensor | None  # [G, C, H, W]; None if there is no readable image
    labels: Any  # labels of the G images, by kind
    broken: dict[int, str]  # index of an unreadable image -> error message

    def copied(self) -> "HeldOutBatch":
        """Return a copy outside of the shared memory of workers, which keeps one file open per tensor."""
        return copy.deepcopy(self)


class HeldOutPictures(Dataset):
    """The images of one process, in batches."""

    def __init__(
        self,
        source: LabelledPictures,
        processor: ViTCLSImageProcessor,
        label_space: LabelSpace,
        batch_size: int,
        process: int,
        num_processes: int,
        num_channels: int | None = None,
    ) -> None:
        self.source = source
        self.processor = processor
        self.num_channels = num_channels
        self.label_space = label_space
        per_round = batch_size * num_processes
        starts = range(process * batch_size, len(source) + process * batch_size, per_round)
        self.batches = [range(start, start + batch_size) for start in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> HeldOutBatch:
        images, labels, broken = [], [], {}
        for position in self.batches[index]:
            if position >= len(self.source):
                break
            try:
                picture = self.source.pictures[position]
                pixels = self.processor(picture, return_tensors="pt")["pixel_values"][0]  # [C, H, W]
                check_channels(picture, pixels, self.num_channels)
                images.append(pixels)
                labels.append(self.source.labels[position])
            except ValueError as error:  # BrokenPicture, or an image that the image processor does not support
                broken[position] = str(error)
        pixel_values = torch.stack(images) if images else None
        return HeldOutBatch(pixel_values, COLLATE[self.label_space.kind](labels, self.label_space), broken)


COLLATE: dict[LabelKind, Callable[[list[Any], LabelSpace], Any]] = {
    "single_label_classification": lambda labels, space: torch.tensor(labels, dtype=torch.long),  # [G]
    "multi_label_classification": lambda labels, space: torch.tensor(labels, dtype=torch.float32).reshape(
        -1, len(space.names)
    ),  # [G, L]
    "multi_task": lambda labels, space: {
        task: torch.tensor([label[task] for label in labels], dtype=torch.long) for task in space.columns
    },
}


class Evaluator:
    """Evaluate models repeatedly on the same images.

    Args:
        pictures: all images and labels, on every process.
        processor: image processor that returns `pixel_values`.
        label_space: label space of the images, in the order of the model's logits.
        batch_size: number of images per process and forward pass.
        num_workers: number of worker processes per process; 0 prepares the images in the process itself.
        accelerator: device, precision and processes.
        max_broken_images: maximum number of unreadable images, which are skipped; more stop the evaluation.
        warn: function that prints a line about each unreadable image, once, on the main process.
        num_channels: number of channels of the model; images with another number count as unreadable.
    """

    def __init__(
        self,
        pictures: LabelledPictures,
        processor: ViTCLSImageProcessor,
        label_space: LabelSpace,
        batch_size: int,
        num_workers: int,
        accelerator: Accelerator,
        max_broken_images: int = DataOptions.max_broken_images,
        warn: Callable[[str], None] = print,
        num_channels: int | None = None,
    ) -> None:
        self.num_pictures = len(pictures)
        self.label_space = label_space
        self.batch_size = batch_size
        self.accelerator = accelerator
        self.described: dict[int, str] = {}  # index of an unreadable image -> error message; on all processes
        self.tally = BrokenPictures(self.described.__getitem__, accelerator.on_main_process(warn), max_broken_images)
        share = HeldOutPictures(
            pictures,
            processor,
            label_space,
            batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            num_channels,
        )
        self.batches = KeptBatches(share, num_workers)

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, watch: Callable[["KeptBatches"], Iterable[HeldOutBatch]] = iter
    ) -> dict[str, Any]:
        """Return the metrics of a model in evaluation mode, as defined in metrics.py for the kind of labels.

        Numbers come before lists and dicts. The first number is the metric for comparing models. `num_broken_images`
        is added, and unreadable images are not included in `num_images`. Floats are rounded to six decimals.

        Args:
            model: the model as `Accelerator.prepare` returned it, or moved to the device.
            watch: function that yields the batches of this process and shows progress.

        Raises:
            ValueError: if too many images, or all images, are unreadable.
            RuntimeError: if an image was not counted exactly once.
        """
        metrics = self.build_metrics()
        broken: dict[int, str] = {}
        for batch in watch(self.batches):
            broken |= batch.broken
            labels = send_to_device(batch.labels, self.accelerator.device)
            metrics.update(self.outputs(model, batch), labels)

        broken = dict(gather_object(list(broken.items())))
        self.described |= broken
        self.tally.note(sorted(broken))
        if len(broken) == self.num_pictures:
            raise ValueError(f"there is nothing to evaluate on: none of the {self.num_pictures} images can be read")
        values = rounded(metrics.compute())
        if values["num_images"] + len(broken) != self.num_pictures:
            raise RuntimeError(
                f"evaluation counted {values['num_images']} images and {len(broken)} broken ones of "
                f"{self.num_pictures}: this is a bug"
            )
        return scalars(values) | {"num_broken_images": len(broken)} | values

    def build_metrics(self) -> Any:
        """Build the metrics for the kind of labels."""
        return METRICS[self.label_space.kind](self.label_space, self.accelerator.device)

    def outputs(self, model: nn.Module, batch: HeldOutBatch) -> Any:
        """Return the model outputs for a padded batch."""
        with self.accelerator.autocast():
            return model(self.filled_up(model, batch.pixel_values))

    def filled_up(self, model: nn.Module, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Return pixel values [G, C, H, W] padded with blank images to [B, C, H, W], on the device."""
        if pixel_values is None:
            config = self.accelerator.unwrap_model(model).config
            pixel_values = torch.zeros(0, config.num_channels, *config.image_height_width)
        missing = self.batch_size - len(pixel_values)
        if missing:
            pixel_values = torch.cat([pixel_values, pixel_values.new_zeros(missing, *pixel_values.shape[1:])])
        return pixel_values.to(self.accelerator.device)


class KeptBatches:
    """The batches of a process, in order. After the first pass they come from memory if all batches fit."""

    def __init__(self, share: HeldOutPictures, num_workers: int) -> None:
        self.loader = DataLoader(
            share,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # a separate generator, so that evaluations do not change training
        )
        self.kept: list[HeldOutBatch] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[HeldOutBatch]:
        if self.kept is not None:
            yield from self.kept
            return
        keeping: list[HeldOutBatch] | None = []
        num_bytes = 0
        for batch in self.loader:
            num_bytes += batch.pixel_values.nbytes if batch.pixel_values is not None else 0
            if num_bytes > KEPT_BYTES:
                keeping = None
            elif keeping is not None:
                keeping.append(batch.copied())
            yield batch
        self.kept = keeping


def rounded(value: Any) -> Any:
    """Return the value with all floats, including floats in lists and dicts, rounded to six decimals."""
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return value
