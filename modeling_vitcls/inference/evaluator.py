"""Evaluation of a model on labeled images. Each image is counted exactly once with any number of processes.

    images -> images of this process -> pixel_values and labels -> model -> metrics over all processes

Sharded models require that all processes run the same number of batches of the same size. The images are therefore
distributed in rounds of one batch per process. The last round is padded with blank images, which have no labels and
are not counted. An unreadable image is replaced with a blank image, reported by name, and counted as unreadable.

Metrics are in metrics.py; evaluate.py evaluates a saved model and writes the results.
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

from ..data.batches import leave_signals_to_parent
from ..data.images import LabeledImages, UnreadableImageCounter, check_channels
from ..data.labels import LabelKind, LabelSpace
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..options import DataOptions
from .metrics import METRICS, select_scalars


MAX_CACHE_BYTES = 256 * 2**20  # maximum size of the cache of preprocessed images per process, in bytes


@dataclass
class HeldOutBatch:
    """One batch of a process: the readable images with labels, and the error messages for unreadable images."""

    pixel_values: torch.Tensor | None  # [G, C, H, W]; None if there is no readable image
    labels: Any  # labels of the G readable images; the type depends on the kind of labels
    indices: list[int]  # indices of the G readable images
    error_messages: dict[int, str]  # index of each unreadable image -> error message


@dataclass
class HeldOutBatches(Dataset):
    """A dataset whose items are the batches of one process."""

    source: LabeledImages
    processor: ViTCLSImageProcessor
    label_space: LabelSpace
    batch_size: int
    process_index: int
    num_processes: int
    num_channels: int | None = None

    def __post_init__(self) -> None:
        first_index = self.process_index * self.batch_size
        batch_starts = range(first_index, len(self.source) + first_index, self.batch_size * self.num_processes)
        self.index_ranges = [range(start, min(start + self.batch_size, len(self.source))) for start in batch_starts]

    def __len__(self) -> int:
        return len(self.index_ranges)

    def __getitem__(self, index: int) -> HeldOutBatch:
        pixel_values, labels, indices, error_messages = [], [], [], {}
        for image_index in self.index_ranges[index]:
            try:
                image = self.source.images[image_index]
                pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]  # [C, H, W]
                check_channels(image, pixels, self.num_channels)
                pixel_values.append(pixels)
                labels.append(self.source.labels[image_index])
                indices.append(image_index)
            except ValueError as error:  # UnreadableImage, or an image that the image processor does not support
                error_messages[image_index] = str(error)
        return HeldOutBatch(
            torch.stack(pixel_values) if pixel_values else None,
            COLLATE_FUNCTIONS[self.label_space.kind](labels, self.label_space),
            indices,
            error_messages,
        )


COLLATE_FUNCTIONS: dict[LabelKind, Callable[[list[Any], LabelSpace], Any]] = {
    "single_label_classification": lambda labels, label_space: torch.tensor(labels, dtype=torch.long),  # [G]
    "multi_label_classification": lambda labels, label_space: torch.tensor(labels, dtype=torch.float32).reshape(
        -1, len(label_space.names)
    ),  # [G, L]
    "multi_task": lambda labels, label_space: {
        task: torch.tensor([label[task] for label in labels], dtype=torch.long) for task in label_space.columns
    },
}


class Evaluator:
    """Evaluates models on a fixed set of labeled images.

    Args:
        images: all images and labels; the same on every process.
        processor: image processor that returns `pixel_values`.
        label_space: names of the labels, in the order of the model's logits.
        batch_size: number of images per process and forward pass.
        num_workers: number of data loading workers per process; with 0, no worker processes are started.
        accelerator: the accelerator, which defines the device, the precision and the processes.
        max_unreadable_images: maximum number of unreadable images, which are skipped. The evaluation fails if more
            images are unreadable.
        warn: function that prints a warning; called on the main process, once for each unreadable image.
        num_channels: number of input channels of the model. Images with a different number of channels are
            counted as unreadable.

    With `keep_logits = True`, `logits` contains the logits of the last evaluation, {image index: tensor [L]}, for all
    readable images, on every process.
    """

    keep_logits = False

    def __init__(
        self,
        images: LabeledImages,
        processor: ViTCLSImageProcessor,
        label_space: LabelSpace,
        batch_size: int,
        num_workers: int,
        accelerator: Accelerator,
        max_unreadable_images: int = DataOptions.max_unreadable_images,
        warn: Callable[[str], None] = print,
        num_channels: int | None = None,
    ) -> None:
        self.images = images
        self.num_images = len(images)
        self.label_space = label_space
        self.batch_size = batch_size
        self.accelerator = accelerator
        self.error_messages: dict[int, str] = {}  # index of each unreadable image -> error message, for all processes
        self.unreadable_counter = UnreadableImageCounter(
            self.error_messages.__getitem__, accelerator.on_main_process(warn), max_unreadable_images
        )
        process_index, num_processes = accelerator.process_index, accelerator.num_processes
        local_batches = HeldOutBatches(
            images, processor, label_space, batch_size, process_index, num_processes, num_channels
        )
        self.batches = CachedBatches(local_batches, num_workers)

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, show_progress: Callable[["CachedBatches"], Iterable[HeldOutBatch]] = iter
    ) -> dict[str, Any]:
        """Evaluate a model on the device in evaluation mode. Return the metrics for the kind of labels (metrics.py).

        In the returned dict, numbers come before lists and dicts, and the first number is the metric for comparing
        models. `num_unreadable_images` is the number of unreadable images, which `num_images` excludes. Floats are
        rounded to six decimals. `show_progress` yields the given batches and shows progress.

        Raises:
            ValueError: if all images are unreadable, or if more than `max_unreadable_images` images are unreadable.
            RuntimeError: if an image was not counted exactly once.
        """
        metrics = self.build_metrics()
        error_messages: dict[int, str] = {}
        logits: list[tuple[int, torch.Tensor]] = []
        for batch in show_progress(self.batches):
            error_messages |= batch.error_messages
            labels = send_to_device(batch.labels, self.accelerator.device)
            outputs = self.compute_outputs(model, batch)
            metrics.update(outputs, labels)
            if self.keep_logits:
                logits += zip(batch.indices, outputs.logits.float().cpu(), strict=False)  # without padding

        error_messages = dict(gather_object(list(error_messages.items())))
        self.logits = dict(sorted(gather_object(logits), key=lambda item: item[0])) if self.keep_logits else {}
        self.error_messages |= error_messages
        self.unreadable_counter.add(sorted(error_messages))
        num_unreadable = len(error_messages)
        if num_unreadable == self.num_images:
            raise ValueError(f"none of the {self.num_images} images can be read. Check the dataset")
        metric_values = round_floats(metrics.compute())
        if metric_values["num_images"] + num_unreadable != self.num_images:
            raise RuntimeError(
                f"evaluation counted {metric_values['num_images']} readable and {num_unreadable} unreadable images, "
                f"but expected {self.num_images} images in total. This is a bug. Report it with "
                "the output of `vitcls env`"
            )
        return select_scalars(metric_values) | {"num_unreadable_images": num_unreadable} | metric_values

    def build_metrics(self) -> Any:
        """Build the metrics for the kind of labels."""
        return METRICS[self.label_space.kind](self.label_space, self.accelerator.device)

    def compute_outputs(self, model: nn.Module, batch: HeldOutBatch) -> Any:
        """Return the model outputs for a batch, which is padded with blank images."""
        with self.accelerator.autocast():
            return model(self.pad_batch(model, batch.pixel_values))

    def pad_batch(self, model: nn.Module, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Pad pixel values [G, C, H, W] with blank images to [B, C, H, W], and move the padded batch to the device."""
        if pixel_values is None:
            config = self.accelerator.unwrap_model(model).config
            pixel_values = torch.zeros(0, config.num_channels, *config.image_height_width)
        num_padding = self.batch_size - len(pixel_values)
        if num_padding:
            pixel_values = torch.cat([pixel_values, pixel_values.new_zeros(num_padding, *pixel_values.shape[1:])])
        return pixel_values.to(self.accelerator.device)


class CachedBatches:
    """Iterable over the batches of a process. The first pass caches batches of up to `MAX_CACHE_BYTES` in total."""

    def __init__(self, batches: HeldOutBatches, num_workers: int) -> None:
        self.loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # a separate generator, so that evaluations do not affect training
        )
        self.cache: list[HeldOutBatch] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[HeldOutBatch]:
        if self.cache is not None:
            yield from self.cache
            return
        cache: list[HeldOutBatch] | None = []
        num_bytes = 0
        for batch in self.loader:
            num_bytes += 0 if batch.pixel_values is None else batch.pixel_values.nbytes
            if num_bytes > MAX_CACHE_BYTES:
                cache = None
            elif cache is not None:
                cache.append(copy.deepcopy(batch))  # without a copy, shared memory would keep one file per tensor open
            yield batch
        self.cache = cache


def round_floats(value: Any) -> Any:
    """Return the value with all floats rounded to six decimals, including floats in nested lists and dicts."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list):
        return [round_floats(item) for item in value]
    if isinstance(value, dict):
        return {name: round_floats(item) for name, item in value.items()}
    return value
