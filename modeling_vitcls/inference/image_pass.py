"""One pass of images through a model, for metrics, features, predictions and measurements.

    images -> prepare_ahead, in threads -> batches -> pass_over_images(compute, batches, device) -> batch, outputs

    ImagePass      labeled images of a dataset, on any number of processes; each image is counted exactly once
    Evaluator      an ImagePass whose outputs become metrics (evaluator.py)

Sharded models require that all processes run the same number of batches of the same size. The
images are therefore distributed in rounds of one batch per process. The last round is padded with
blank images, which have no labels and are not counted. An unreadable image is reported by name, and
counted as unreadable.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Self, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ..data.images import DatasetImages, LabeledImages, check_channels, count_unreadable
from ..data.labels import LabelSpace
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..runtime.progress import track
from ..speed.fast_images import compute_pixels
from .cuda_graphs import GraphedFunction
from .feature_store import FeatureStore


Source = TypeVar("Source")
Prepared = TypeVar("Prepared")


@dataclass
class ImageBatch:
    """Preprocessed images of one shape, and the error messages for unreadable images."""

    # [G, C, H, W], or [G, F] kept features; None if there is no readable image
    pixel_values: Tensor | None
    labels: Any = None  # Labels of the G readable images; the type depends on the kind of labels
    indices: list[int] = field(default_factory=list)  # Indices of the G readable images
    # Index of each unreadable image -> error message
    error_messages: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageOutputs:
    """The outputs of a model for the readable images of a pass, one row for each image."""

    labels: np.ndarray  # [N] class indices, or [N, L] with several labels per image
    indices: np.ndarray  # [N] indices of the images in the pass, in ascending order
    names: np.ndarray  # [N]
    groups: np.ndarray  # [N]; copies of an image are in one group
    num_unreadable: int = 0
    # Float32 arrays, if the pass computes them
    logits: Any = None  # [N, L]
    features: Any = None  # [N, all]
    rings: Any = None  # [N, rings, layers, D]

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays, whose rows are the images, by name."""
        return {name: each for name, each in vars(self).items() if isinstance(each, np.ndarray)}

    def take(self, rows: np.ndarray | slice) -> Self:
        """Take some rows, given their positions, a mask or a slice."""
        return replace(self, **{name: array[rows] for name, array in self.arrays.items()})

    def join(self, other: Self) -> Self:
        """Append the rows of another pass."""
        arrays = {
            name: np.concatenate([array, other.arrays[name]]) for name, array in self.arrays.items()
        }
        return replace(self, num_unreadable=self.num_unreadable + other.num_unreadable, **arrays)


# Function of images [B, C, H, W] on the device of the model
Compute = Callable[[Tensor], Any]
# Function of the index of an image: its pixels [C, H, W], what is kept of it [F], or why it is unreadable
Prepare = Callable[[int], Tensor | str]


def pass_over_images(
    compute: Compute,
    batches: Iterable[ImageBatch],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[tuple[ImageBatch, Any]]:
    """Yield each batch with what `compute` returns for its images, without gradients.

    Args:
        compute: function of the images of a batch [B, C, H, W].
        batches: batches of images of one shape. Without a readable image, the outputs are None.
        device: device of the model.
        autocast: function that returns a context manager for a forward pass.
    """
    for batch in batches:
        outputs = None
        if batch.pixel_values is not None:
            with torch.no_grad(), autocast():
                outputs = compute(batch.pixel_values.to(device))
        yield batch, outputs


def find_finite(outputs: Mapping[str, Tensor]) -> Tensor:
    """Find the images [B] whose outputs [B, ...] are finite; others must not become a result."""
    are_finite = [tensor.flatten(1).isfinite().all(dim=1) for tensor in outputs.values()]
    return torch.stack(are_finite).all(dim=0)


# Preprocessing ------------------------------------------------------------------------------------


def prepare_ahead(
    prepare: Callable[[Source], Prepared], items: Iterable[Source], num_threads: int, num_ahead: int
) -> Iterator[Prepared]:
    """Prepare items in threads, up to `num_ahead` in advance, and yield the results in order.

    Threads are faster than processes, because decoding and resizing release the GIL and no data is
    copied. On two cores, two threads loaded JPEG files of 500 x 375 pixels 1.3 times as fast as two
    processes. Without threads, an item is prepared when it is needed.
    """
    if not num_threads:
        yield from map(prepare, items)
        return
    pool = ThreadPoolExecutor(num_threads, initializer=use_one_core)
    futures: deque[Future[Prepared]] = deque()
    try:
        for item in items:
            futures.append(pool.submit(prepare, item))
            if len(futures) > num_ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        # A caller that stops early does not wait for images that it no longer needs
        pool.shutdown(cancel_futures=True)


def use_one_core() -> None:
    """Keep PyTorch from starting threads for this thread: on 16 cores, they waited for one another.

    Decoding and resizing then took 11 cores for 550 photos a second, instead of 4.5 for 1,460.
    """
    torch.get_num_threads()  # A new thread would otherwise choose its number later
    threadpool_limits(limits=1, user_api="openmp")


def prepare_batches(
    prepare: Prepare, batches: Sequence[Sequence[int]], num_threads: int = 0
) -> Iterator[ImageBatch]:
    """Yield the preprocessed images of each batch.

    A batch with images of several shapes becomes one batch per shape, and a batch without a
    readable image remains one.

    Args:
        prepare: function of the index of an image.
        batches: indices of the images of each batch, which may be empty.
        num_threads: number of threads that prepare up to two batches in advance.
    """
    num_ahead = 2 * max(map(len, batches), default=0)
    prepared = prepare_ahead(prepare, chain.from_iterable(batches), num_threads, num_ahead)
    for indices in batches:
        errors: dict[int, str] = {}
        groups: dict[torch.Size, dict[int, Tensor]] = {}
        for index, value in zip(indices, prepared, strict=False):  # Leaves the next batches
            if isinstance(value, str):
                errors[index] = value
            else:  # Image processors may preserve the aspect ratio
                groups.setdefault(value.shape, {})[index] = value
        for group in groups.values() or [{}]:
            pixels = torch.stack(list(group.values())) if group else None
            yield ImageBatch(pixels, indices=list(group), error_messages=errors)
            errors = {}  # Named once


def read_pixels(
    images: Sequence[Any], processor: ViTCLSImageProcessor, num_channels: int, index: int
) -> Tensor | str:
    """Decode and preprocess the image at an index, or tell why it is unreadable.

    It also is with another number of channels than `num_channels`.
    """
    try:
        image = images[index]
        pixels = compute_pixels(processor, image)
        check_channels(image, pixels, num_channels)
    # Unreadable, not supported by the image processor, or too thin for torchvision to resize
    except (ValueError, RuntimeError) as error:
        return str(error)
    return pixels


# Labeled images -----------------------------------------------------------------------------------


class ImagePass:
    """Labeled images that pass through models, as often as needed.

    Args:
        images: all images and labels, the same on every process.
        processor: image processor that returns `pixel_values`.
        label_space: names of the labels, in the order of the model's logits.
        batch_size: number of images per process and forward pass.
        accelerator: the accelerator, which defines the device, the precision and the processes.
        num_workers: number of threads that load images.
        num_channels: number of input channels of the model. Images with a different number of
            channels are counted as unreadable.
        warn: function that prints a warning; called on the main process, once for each unreadable
            image.
        store: has what photos have left in earlier passes, and keeps the `row` that `read` returns in
            `collect`.
    """

    pass_name = "features"  # What a pass over the images does, for the progress
    max_cache_bytes = 0  # A cache of preprocessed images would serve only a second pass

    def __init__(
        self,
        images: LabeledImages,
        processor: ViTCLSImageProcessor,
        label_space: LabelSpace,
        batch_size: int,
        accelerator: Accelerator,
        num_workers: int,
        num_channels: int,
        warn: Callable[[str], None],
        store: FeatureStore | None = None,
    ) -> None:
        self.images = images
        self.processor = processor
        self.label_space = label_space
        self.batch_size = batch_size
        self.accelerator = accelerator
        self.warn = accelerator.on_main_process(warn)
        # Without encoded images, none has a key
        self.store = store if isinstance(images.images, DatasetImages) else None
        self.unreadable: set[int] = set()  # Images that were named already

        # Each process takes one batch per round; the last round may have empty batches
        round_size = batch_size * accelerator.num_processes
        stop = math.ceil(len(images) / round_size) * round_size
        starts = range(accelerator.process_index * batch_size, stop, round_size)
        indices = [range(start, min(start + batch_size, len(images))) for start in starts]

        def prepare(index: int) -> Tensor | str:
            decode = partial(read_pixels, images.images, processor, num_channels, index)
            if self.store is None:
                return decode()
            return self.store.prepare(index, images.images.get_encoded_image(index), decode)

        self.prepare_batches = partial(prepare_batches, prepare, indices, num_workers)
        self.cache: list[ImageBatch] | None = None

    def collect(
        self,
        model: nn.Module,
        compute: Compute,
        console: Console | None = None,
        read: Callable[[Any], dict[str, Tensor]] = dict,
    ) -> ImageOutputs:
        """Collect what `read` returns for each readable image, in order, on every process.

        Args:
            model: the model that `compute` runs, on the device and in evaluation mode.
            compute: function of images [B, C, H, W], or of the rows [B, F] that are kept of them.
            console: console for the progress (runtime/progress.py).
            read: function of what `compute` returns, which returns a tensor [B, ...] for each field
                of `ImageOutputs` that it computes.

        Raises:
            ValueError: after the last batch, if all images are unreadable, if more than
                `MAX_UNREADABLE_IMAGES` images are unreadable, or if the outputs for any image are
                not finite.
        """
        accelerator = self.accelerator
        batches = track(
            self.load_batches(),
            self.pass_name,
            len(self.images),
            count=lambda batch: (
                (len(batch.indices) + len(batch.error_messages)) * accelerator.num_processes
            ),
            console=console or Console(quiet=not accelerator.is_main_process),
            has_bar=console is not None,
        )
        padded_batches = (self.pad_batch(model, batch) for batch in batches)
        if accelerator.num_processes == 1:  # The processes of a sharded model wait for one another
            compute = GraphedFunction(compute, accelerator.device)
        error_messages: dict[int, str] = {}
        parts = []
        for batch, outputs in pass_over_images(
            lambda images: read(compute(images)),
            padded_batches,
            accelerator.device,
            accelerator.autocast,
        ):
            error_messages |= batch.error_messages
            if self.store is not None:
                self.store.write(batch.indices, outputs.pop("row"))
            arrays = {
                # Further rows are padding.
                name: values[: len(batch.indices)].float().cpu().numpy()
                for name, values in outputs.items()
            }
            parts.append(arrays | {"indices": np.array(batch.indices, np.int64)})
        if self.store is not None:
            self.store.close()

        # Errors are raised after the last batch, by all processes together. A process that stopped
        # in the middle would leave the others waiting for its part of a sharded model.
        error_messages = dict(sorted(gather_object(list(error_messages.items()))))
        count_unreadable(self.unreadable, error_messages, self.warn)
        if len(error_messages) == len(self.images):
            first_error = next(iter(error_messages.values()), "no image")
            raise ValueError(
                f"none of the {len(error_messages)} images can be read ({first_error}). Check the "
                "dataset"
            )
        parts = gather_object(parts)
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        indices = arrays["indices"]
        is_finite = find_finite({name: torch.from_numpy(arrays[name]) for name in outputs})
        if not is_finite.all():
            raise ValueError(
                f"the outputs of the model are not finite for {(~is_finite).sum():,} of "
                f"{len(indices):,} images. Check the weights, or set `mixed_precision='no'`"
            )

        groups = np.arange(len(self.images)) if self.images.groups is None else self.images.groups
        rows = ImageOutputs(
            labels=self.label_space.collate([self.images.labels[row] for row in indices]).numpy(),
            names=np.array(self.images.images.get_names(), str)[indices],
            groups=groups[indices],
            num_unreadable=len(error_messages),
            **arrays,
        )
        return rows.take(np.argsort(indices))

    def pad_batch(self, model: nn.Module, batch: ImageBatch) -> ImageBatch:
        """Add blank images to a batch, up to the batch size, if required.

        It is if the model is shared by several processes or compiled for a batch size, or if no
        image is readable.
        """
        pixel_values = batch.pixel_values
        if pixel_values is None:
            config = self.accelerator.unwrap_model(model).config
            # [0, C, H, W]
            pixel_values = torch.zeros(0, config.num_channels, *config.image_height_width)

        is_shared = self.accelerator.num_processes > 1
        is_compiled = getattr(model, "_compiled_call_impl", None) is not None
        num_padding = self.batch_size - len(pixel_values)
        if num_padding and (is_shared or is_compiled or not len(pixel_values)):
            padding = pixel_values.new_zeros(num_padding, *pixel_values.shape[1:])
            pixel_values = torch.cat([pixel_values, padding])
        return replace(batch, pixel_values=pixel_values)

    def load_batches(self) -> Iterator[ImageBatch]:
        """Yield the batches of this process.

        The first pass caches batches of up to `max_cache_bytes` in total.
        """
        if self.cache is not None:
            yield from self.cache
            return

        cache: list[ImageBatch] | None = []
        num_bytes = 0
        for batch in self.prepare_batches():
            num_bytes += 0 if batch.pixel_values is None else batch.pixel_values.nbytes
            if num_bytes > self.max_cache_bytes:
                cache = None
            elif cache is not None:
                cache.append(batch)
            yield batch

        # Set after the last batch, because a caller may stop earlier
        self.cache = cache
