"""Evaluation of a model on labeled images. Each image is counted exactly once with any number of processes.

    images -> images of this process -> pixel_values and labels -> model -> metrics over all processes

Sharded models require that all processes run the same number of batches of the same size. The images are therefore
distributed in rounds of one batch per process. The last round is padded with blank images, which have no labels and
are not counted. An unreadable image is replaced with a blank image, reported by name, and counted as unreadable.

A streamed split is read in every evaluation. Each process reads its own shards, or every n-th image.

Metrics are in metrics.py; evaluate.py evaluates a saved model and writes the results.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset

from ..data.aspect_ratio import get_output_size
from ..data.images import LabeledImages, UnreadableImageCounter, check_channels, decode_image
from ..data.labels import LabelSpace
from ..data.streaming import Example, StreamedImages, read_ahead
from ..data.workers import build_loader, explain_worker_errors
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..options import DataOptions
from ..runtime.progress import track
from .metrics import METRICS, select_scalars


# maximum size of the cache of preprocessed images per process, in bytes
MAX_CACHE_BYTES = 256 * 2**20


@dataclass
class EvaluationBatch:
    """One batch of a process: the readable images with labels, and the error messages for unreadable images."""

    pixel_values: torch.Tensor | None  # [G, C, H, W]; None if there is no readable image
    labels: Any  # labels of the G readable images; the type depends on the kind of labels
    indices: list[int]  # indices of the G readable images
    error_messages: dict[int, str]  # index of each unreadable image -> error message
    names: list[str] = field(default_factory=list)  # names of the G readable images of a stream


@dataclass(frozen=True)
class OutputRow:
    """The output of a model for one image."""

    index: int
    label: torch.Tensor  # class index, or [L] with several labels; on the CPU
    logits: np.ndarray  # [L] `float32`; features of any shape (frozen.py)
    name: str


Key = int | tuple[int, Example]  # index of a stored image, or index and example of a streamed image


@dataclass
class EvaluationBatches(Dataset):
    """Dataset whose items are the batches of one process. Iterating over it yields the keys of each batch."""

    source: LabeledImages | StreamedImages
    processor: ViTCLSImageProcessor
    label_space: LabelSpace
    batch_size: int
    process_index: int
    num_processes: int
    num_channels: int | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.source) / (self.batch_size * self.num_processes))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Sequence[Key]]:
        if isinstance(self.source, StreamedImages):
            examples = self.source.iterate_in_order(self.process_index, self.num_processes)
            keys = (
                (self.process_index + n * self.num_processes, example)
                for n, example in enumerate(examples)
            )
            yield from read_ahead(
                iter(lambda: list(islice(keys, self.batch_size)), []), num_items=2
            )
            return
        for batch_index in range(len(self)):
            start = (batch_index * self.num_processes + self.process_index) * self.batch_size
            yield range(start, min(start + self.batch_size, len(self.source)))

    def __getitem__(self, keys: Sequence[Key]) -> EvaluationBatch:
        pixel_values = []
        labels = []
        batch = EvaluationBatch(None, None, [], {})
        for key in keys:
            index, example = key if isinstance(key, tuple) else (key, None)
            try:
                if example is None:
                    image, label = self.source.images[index], self.source.labels[index]  # type: ignore[union-attr]
                else:
                    image = decode_image(example.encoded_image, example.name)
                    label = example.label
                pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]  # [C, H, W]
                check_channels(image, pixels, self.num_channels)
            except (
                ValueError
            ) as error:  # UnreadableImage, or an image that the image processor does not support
                batch.error_messages[index] = str(error)
                continue
            pixel_values.append(pixels)
            labels.append(label)
            batch.indices.append(index)
            if example is not None:
                batch.names.append(example.name)
        batch.pixel_values = torch.stack(pixel_values) if pixel_values else None
        batch.labels = collate_labels(labels, self.label_space)
        return batch


def collate_labels(labels: list[Any], label_space: LabelSpace) -> Any:
    """Return the labels of G images, 0 or more, as [G] `int64`, [G, L] `float32`, or {task: [G] `int64`}."""
    if label_space.kind == "multi_task":
        return {
            task: torch.tensor([label[task] for label in labels], dtype=torch.int64)
            for task in label_space.columns
        }
    if label_space.kind == "multi_label_classification":
        return torch.tensor(labels, dtype=torch.float32).reshape(-1, len(label_space.names))
    return torch.tensor(labels, dtype=torch.int64)


@dataclass(frozen=True)
class TaskOutput:
    """The logits of an added task, as the output of a classifier."""

    logits: torch.Tensor
    cls_logits: torch.Tensor | None = None
    distillation_logits: torch.Tensor | None = None


class Evaluator:
    """Evaluates models on a fixed set of labeled images.

    Args:
        images: all images and labels, the same on every process; or a streamed split.
        processor: image processor that returns `pixel_values`.
        label_space: names of the labels, in the order of the model's logits.
        options: numbers of data loading workers and of unreadable images. Unreadable images are skipped; the
            evaluation fails if more images are unreadable.
        batch_size: number of images per process and forward pass.
        accelerator: the accelerator, which defines the device, the precision and the processes.
        num_channels: number of input channels of the model. Images with a different number of channels are
            counted as unreadable.
        warn: function that prints a warning; called on the main process, once for each unreadable image.

    With `task`, the logits are those of this added task.

    With `keep_logits = True`, `rows` contains the outputs of the last evaluation for all readable images, in their
    order, on every process.
    """

    keep_logits = False
    task: str | None = None
    pass_name = "evaluating"  # what a pass over the images does, for the progress

    def __init__(
        self,
        images: LabeledImages | StreamedImages,
        processor: ViTCLSImageProcessor,
        label_space: LabelSpace,
        options: DataOptions,
        batch_size: int,
        accelerator: Accelerator,
        num_channels: int | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.images = images
        self.label_space = label_space
        self.batch_size = batch_size
        self.accelerator = accelerator
        warn = accelerator.on_main_process(warn)
        self.unreadable_counter = UnreadableImageCounter(warn, options.max_unreadable_images)
        process_index, num_processes = accelerator.process_index, accelerator.num_processes
        batches = EvaluationBatches(
            images, processor, label_space, batch_size, process_index, num_processes, num_channels
        )
        height, width = get_output_size(processor)
        image_bytes = (num_channels or 3) * (height or 0) * (width or 0) * torch.float32.itemsize
        batch_images = (
            batch_size if isinstance(images, StreamedImages) else min(batch_size, len(images))
        )
        self.num_workers = options.num_workers
        self.loader = build_loader(
            batches,
            self.num_workers,
            batch_bytes=batch_images * image_bytes,
            sampler=batches,
            generator=torch.Generator(),  # a separate generator, so that evaluations do not affect training
        )
        self.num_batches = None if isinstance(images, StreamedImages) else len(batches)
        self.cache: list[EvaluationBatch] | None = None
        self.rows: list[OutputRow] = []

    @torch.no_grad()
    def __call__(self, model: nn.Module, console: Console | None = None) -> dict[str, Any]:
        """Evaluate a model on the device in evaluation mode. Return the metrics for the kind of labels (metrics.py).

        In the returned dict, numbers come before lists and dicts, and the first number is the metric for comparing
        models. `num_unreadable_images` is the number of unreadable images, which `num_images` excludes. Floats are
        rounded to six decimals. `console` shows the progress (runtime/progress.py).

        Raises:
            ValueError: if all images are unreadable, if more than `max_unreadable_images` images are unreadable, or if
                the outputs of the model for any image are not finite.
        """
        batches: Iterable[EvaluationBatch] = self.load_batches()
        batches = track(
            batches,
            self.pass_name,
            len(self.images) if isinstance(self.images, LabeledImages) else None,
            count=lambda batch: (
                (len(batch.indices) + len(batch.error_messages)) * self.accelerator.num_processes
            ),
            console=console
            or Console(quiet=not self.accelerator.is_main_process, soft_wrap=True, highlight=False),
            has_bar=console is not None,
        )
        metrics = self.build_metrics()
        error_messages: dict[int, str] = {}
        num_readable = 0
        num_not_finite = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        rows: list[OutputRow] = []
        for batch in self.synchronize(batches):
            num_readable += len(batch.indices)
            error_messages |= batch.error_messages
            pixel_values = self.pad_batch(model, batch.pixel_values)
            with self.accelerator.autocast():
                outputs = self.compute_outputs(model, pixel_values)
            num_not_finite += count_not_finite(outputs.logits, len(batch.indices))
            if metrics is not None:
                metrics.update(outputs, send_to_device(batch.labels, self.accelerator.device))
            if self.keep_logits:  # without padding
                # a row of a tensor would be pickled with its batch
                logits = outputs.logits.float().cpu().numpy()
                rows += map(
                    OutputRow,
                    batch.indices,
                    batch.labels,
                    logits,
                    batch.names or [""] * len(batch.indices),
                )

        error_messages = dict(sorted(gather_object(list(error_messages.items()))))
        if self.keep_logits:
            self.rows = sorted(gather_object(rows), key=lambda row: row.index)
            if isinstance(self.images, LabeledImages):
                names = self.images.images.get_names()
                self.rows = [replace(row, name=names[row.index]) for row in self.rows]
        self.unreadable_counter.add(error_messages)
        num_readable, num_wrong = map(
            sum, zip(*gather_object([(num_readable, num_not_finite.item())]), strict=True)
        )
        if not num_readable:
            raise ValueError(
                f"none of the {len(error_messages)} images can be read. Check the dataset"
            )
        if num_wrong:
            raise ValueError(
                f"the outputs of the model are not finite for {num_wrong:,} of {num_readable:,} images. Check the "
                "weights, or set --mixed-precision no"
            )
        values = (
            {"num_images": len(self.rows)} if metrics is None else round_floats(metrics.compute())
        )
        return select_scalars(values) | {"num_unreadable_images": len(error_messages)} | values

    def synchronize(self, batches: Iterable[EvaluationBatch]) -> Iterator[EvaluationBatch]:
        """Yield the batches. All processes yield the same number of batches: processes with fewer batches of a stream
        yield batches without images."""
        if isinstance(self.images, LabeledImages) or self.accelerator.num_processes == 1:
            yield from batches
            return
        iterator = iter(batches)
        while any(gather_object([(batch := next(iterator, None)) is not None])):
            yield self.loader.dataset[[]] if batch is None else batch

    def build_metrics(self) -> Any:
        """Build the metrics for the kind of labels; None if only the rows are needed."""
        return METRICS[self.label_space.kind](self.label_space, self.accelerator.device)

    def compute_outputs(self, model: nn.Module, pixel_values: torch.Tensor) -> Any:
        """Return the model outputs for images [B, C, H, W]."""
        outputs = model(pixel_values)
        return outputs if self.task is None else TaskOutput(outputs.task_logits[self.task])

    def pad_batch(self, model: nn.Module, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Move pixel values [G, C, H, W] to the device. Pad them with blank images to [B, C, H, W] if the model is
        shared by several processes or compiled for a batch size, or if no image is readable."""
        if pixel_values is None:
            config = self.accelerator.unwrap_model(model).config
            pixel_values = torch.zeros(0, config.num_channels, *config.image_height_width)
        is_compiled = getattr(model, "_compiled_call_impl", None) is not None
        num_padding = self.batch_size - len(pixel_values)
        if num_padding and (
            self.accelerator.num_processes > 1 or is_compiled or not len(pixel_values)
        ):
            pixel_values = torch.cat(
                [pixel_values, pixel_values.new_zeros(num_padding, *pixel_values.shape[1:])]
            )
        return pixel_values.to(self.accelerator.device)

    def load_batches(self) -> Iterator[EvaluationBatch]:
        """Yield the batches of this process. The first evaluation caches batches of up to `MAX_CACHE_BYTES` in total;
        a stream is not cached."""
        if self.cache is not None:
            yield from self.cache
            return
        cache: list[EvaluationBatch] | None = None if self.num_batches is None else []
        num_bytes = 0
        with explain_worker_errors(self.num_workers):
            for batch in self.loader:
                num_bytes += 0 if batch.pixel_values is None else batch.pixel_values.nbytes
                if num_bytes > MAX_CACHE_BYTES:
                    cache = None
                elif (
                    cache is not None
                ):  # without a copy, shared memory would keep one file per tensor open
                    cache.append(copy.deepcopy(batch))
                yield batch
        self.cache = cache


def count_not_finite(outputs: Any, num_images: int) -> torch.Tensor:
    """Return the number of images whose outputs contain NaN or infinity, given a tensor [B, ...], or one by task, of
    which the first `num_images` rows are images."""
    tensors = outputs.values() if isinstance(outputs, dict) else [outputs]
    are_finite = [tensor[:num_images].flatten(1).isfinite().all(dim=1) for tensor in tensors]
    return (~torch.stack(are_finite).all(dim=0)).sum()


def round_floats(value: Any) -> Any:
    """Return the value with all floats rounded to six decimals, including floats in nested lists and dicts."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list):
        return [round_floats(item) for item in value]
    if isinstance(value, dict):
        return {name: round_floats(item) for name, item in value.items()}
    return value
