"""Evaluation of a model on labelled pictures, every one of them counted exactly once on any number of processes.

    pictures -> this process's share -> pixel_values and labels -> model -> metrics, of all processes together

All processes run equally many batches of one size (sharded models need that): the pictures are dealt out in rounds of
one batch per process, and what the last round lacks is filled with blank images, which have no labels and count
nowhere. A picture that cannot be read becomes a blank one too; it is named, and counted as broken.

What is measured is in metrics.py; evaluation of a saved model, with its output, in evaluate.py.
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


KEPT_BYTES = 256 * 2**20  # a process's images are prepared once and kept where all fit into this
DECIMALS = 6


@dataclass
class HeldOutBatch:
    """What a process evaluates at once: up to a batch of pictures that could be read, and those that could not."""

    pixel_values: torch.Tensor | None  # [G, C, H, W]; None where there is no picture
    labels: Any  # of G pictures, by kind
    broken: dict[int, str]  # index of the picture -> what is wrong with it

    def copied(self) -> "HeldOutBatch":
        """In this process's own memory: what workers send stays in shared memory, with an open file per tensor."""
        return copy.deepcopy(self)


class HeldOutPictures(Dataset):
    """One process's share of the pictures, in batches."""

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
            except ValueError as error:  # BrokenPicture, or what the image processor cannot use
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
    """Evaluates a model, again and again, on the same pictures.

    Args:
        pictures: all of them, on every process.
        processor: makes `pixel_values` of a picture.
        label_space: of the labels; the model answers in its order.
        batch_size: pictures per process and forward pass.
        num_workers: processes that prepare pictures, for each process; 0 for none besides it.
        accelerator: device, precision and processes.
        max_broken_images: pictures that cannot be read are left out; more than these end the evaluation.
        warn: shows a line about each of them, once. Called on the main process.
        num_channels: the model's; pictures that the processor gives another number of count as broken.
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
        self.described: dict[int, str] = {}  # index of a broken picture -> what is wrong with it; on all processes
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
        """Metrics of a model in evaluation mode, as metrics.py has them for the kind of labels.

        Numbers come first, and the first of all is the one to compare models by. To them it adds `num_broken_images`,
        which are not in `num_images`. Floats are rounded to six decimals.

        Args:
            model: as `Accelerator.prepare` returned it, or on the device.
            watch: sees this process's batches pass, for progress.

        Raises:
            ValueError: if more pictures than allowed are broken, or all.
            RuntimeError: if any picture was not counted exactly once.
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
        """What is measured."""
        return METRICS[self.label_space.kind](self.label_space, self.accelerator.device)

    def outputs(self, model: nn.Module, batch: HeldOutBatch) -> Any:
        """The model's outputs for a whole batch."""
        with self.accelerator.autocast():
            return model(self.filled_up(model, batch.pixel_values))

    def filled_up(self, model: nn.Module, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Pixel values [G, C, H, W] and blank images behind them, [B, C, H, W] on the device."""
        if pixel_values is None:
            config = self.accelerator.unwrap_model(model).config
            pixel_values = torch.zeros(0, config.num_channels, *config.image_height_width)
        missing = self.batch_size - len(pixel_values)
        if missing:
            pixel_values = torch.cat([pixel_values, pixel_values.new_zeros(missing, *pixel_values.shape[1:])])
        return pixel_values.to(self.accelerator.device)


class KeptBatches:
    """A process's batches, in order; from the second time on out of memory where all of them fit."""

    def __init__(self, share: HeldOutPictures, num_workers: int) -> None:
        self.loader = DataLoader(
            share,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # its own: training must not depend on when it was evaluated
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
    """Floats, also within lists and dicts, to six decimals."""
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return value
