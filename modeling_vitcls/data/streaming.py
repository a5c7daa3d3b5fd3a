"""Datasets that are read during training, without being downloaded or stored (`--streaming`).

    shards -> shuffled in a buffer -> images of this process -> skipped up to the step of a restart
           -> batches of undecoded examples, read ahead by the main process -> decoded and augmented by workers

Each process reads its own shards if the number of shards is a multiple of the number of processes; otherwise it reads
all shards and uses every n-th example. The order depends only on the seed. At the end of its examples, a process
starts again in another order. The index of an example is a checksum of its encoded image (or of its path), so an image
has the same index in every pass and on every process.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..heads_vitcls import IGNORED_LABEL
from ..image_processing_vitcls import shorten
from ..options import DataOptions
from .augmentation import Augmentation
from .batches import Batch, BatchPlan, Preparation, TrainingPictures
from .columns import UNLABELLED, Features, LabelReader, build_label_reader, find_image_column
from .held_out import HeldOutPart
from .images import NO_PICTURE, BrokenPicture, Examples, LabelledPictures, as_encoded, compute_example_key, decoded
from .labels import LabelSpace
from .random_bits import seed_for
from .sources import folder_of, name_of, open_with_datasets


NAMES_KEPT = 10_000  # number of recent examples whose names are kept for error messages
BATCHES_AHEAD = 4  # number of batches read ahead
HELD_OUT_PICTURES = 10_000  # maximum number of held-out images of a stream without an evaluation split


@dataclass(frozen=True)
class Example:
    """An encoded image and its label."""

    encoded: dict[str, Any]  # {"path", "bytes"}
    label: Any
    index: int
    epoch: int = 0


@dataclass(frozen=True)
class StreamedPictures:
    """One split of a streamed dataset, without its held-out images."""

    name: str
    stream: Any  # an IterableDataset whose images are not decoded
    image_column: str
    reader: LabelReader | None  # None: without labels
    folder: Path
    shuffle_buffer: int
    held_out: HeldOutPart | None = None

    @property
    def label_space(self) -> LabelSpace:
        """The kind of labels and their names."""
        return UNLABELLED if self.reader is None else self.reader.space

    def examples(self, seed: int, process: int, num_processes: int, start: int = 0) -> Iterator[Example]:
        """Yield the examples of one process endlessly, from example `start` on; `epoch` counts the passes.

        Raises:
            ValueError: if an example has no label, or a process has no examples.
        """
        number = 0
        while True:
            length = 0
            for example in self.one_pass(seed, number, process, num_processes):
                length += 1
                if length > start:
                    yield replace(example, epoch=number)
            if length == 0:
                raise ValueError(f"{self.name} has no image to train on, for process {process} of {num_processes}")
            passes, rest = divmod(start, length)  # all passes of a process have the same length
            number, start = (number + passes, rest) if passes else (number + 1, 0)

    def one_pass(self, seed: int, number: int, process: int, num_processes: int) -> Iterator[Example]:
        """Yield each example of one process once, shuffled."""
        stream = self.stream
        by_shards = stream.num_shards % num_processes == 0
        if by_shards and num_processes > 1:
            stream = stream.shard(num_processes, process)
        stream = stream.shuffle(seed=seed_for(seed, number), buffer_size=self.shuffle_buffer)
        rows = ((row, index) for row, index in self.indexed(stream) if not self.is_held_out(index))
        mine = rows if by_shards else islice(rows, process, None, num_processes)
        return (self.example(row, index) for row, index in mine)

    def held_out_pictures(self) -> LabelledPictures:
        """Return the encoded held-out images in the order of the stream; all images if `held_out` is None.

        Only the first `HELD_OUT_PICTURES` held-out images are read and kept. Training skips all held-out images.
        """
        rows = self.indexed(self.stream)
        if self.held_out is not None:
            rows = islice((pair for pair in rows if self.is_held_out(pair[1])), HELD_OUT_PICTURES)
        kept = [self.example(row, index) for row, index in rows]
        if not kept:
            raise ValueError(f"{self.name}: no image is held out: raise --held-out-fraction")
        return LabelledPictures(Examples([part.encoded for part in kept], self.folder), [part.label for part in kept])

    def is_held_out(self, index: int) -> bool:
        """Return whether an image is excluded from training."""
        return self.held_out is not None and self.held_out.holds(index)

    def indexed(self, stream: Any) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield rows, with images in the format of `decoded`, and the keys of the images."""
        for row in stream:
            encoded = as_encoded(row[self.image_column], self.folder)
            yield row | {self.image_column: encoded}, compute_example_key(encoded, self.folder)

    def example(self, row: dict[str, Any], index: int) -> Example:
        """Return the example of a row, with its label."""
        encoded = row[self.image_column]
        where = f"{self.name}: the image {encoded['path'] or hex(index)}"
        label = IGNORED_LABEL if self.reader is None else self.reader.read(row, where)
        return Example(encoded, label, index)


# Opening -------------------------------------------------------------------------------------------------------------


def open_streams(options: DataOptions, labelled: bool = True) -> dict[str, StreamedPictures]:
    """Open the splits of a dataset by name.

    Raises:
        ValueError: if the dataset cannot be found, has no image or label column, or does not declare its labels.
    """
    import datasets

    streams = open_with_datasets(options, labelled)
    features = features_of(next(iter(streams.values())), options)
    image_column = find_image_column(options, features)
    reader = build_label_reader(options, features, distinct=None) if labelled else None
    opened = {}
    for name, stream in streams.items():
        if isinstance(features[image_column], datasets.Image):
            stream = stream.cast_column(image_column, datasets.Image(decode=False))
        columns = [image_column, *(column.column for column in (reader.columns if reader else []))]
        opened[name] = StreamedPictures(
            name=name_of(options),
            stream=stream.select_columns(columns),
            image_column=image_column,
            reader=reader,
            folder=folder_of(options),
            shuffle_buffer=options.shuffle_buffer,
        )
    return opened


def features_of(stream: Any, options: DataOptions) -> Features:
    """Return the declared column types of a stream, or the types in its first row."""
    import datasets

    if stream.features is not None:
        return stream.features
    try:
        return datasets.Dataset.from_list([next(iter(stream))]).features
    except StopIteration:
        raise ValueError(f"{options.dataset} is empty") from None


# Training ------------------------------------------------------------------------------------------------------------


class TrainingStream:
    """Augmented training images of a stream, with the interface of `TrainingPictures`.

    An unreadable image is replaced by the next readable image of its batch.
    """

    def __init__(
        self,
        source: StreamedPictures,
        augmentation: Augmentation,
        to_rgb: bool,
        seed: int,
        views: int = 0,
        num_channels: int | None = None,
    ) -> None:
        """`views`: number of augmented views of each image; 0 makes a new view for each pass."""
        self.source = source
        self.preparation = Preparation(augmentation, to_rgb, seed, views, num_channels)
        self.names: dict[int, str] = {}

    def keys(self, plan: BatchPlan, process: int, first_step: int) -> Iterator[list[Example]]:
        """Return the batches of one process from `first_step` on, undecoded, and read batches ahead.

        Raises:
            ValueError: if the number of copies does not divide the batch size. Errors of `StreamedPictures.examples`
                are passed on.
        """
        if plan.batch_size % plan.copies:
            raise ValueError(
                f"--repeated-augmentation {plan.copies} does not divide --batch-size {plan.batch_size}: choose others"
            )
        return read_ahead(self.batches(plan, process, first_step), BATCHES_AHEAD)

    def batches(self, plan: BatchPlan, process: int, first_step: int) -> Iterator[list[Example]]:
        """Yield the batches of one process from `first_step` on, undecoded, without reading ahead."""
        different = plan.batch_size // plan.copies
        done = first_step * plan.accumulation_steps
        examples = self.source.examples(plan.seed, process, plan.num_processes, start=done * different)
        for _ in range(done, plan.num_steps * plan.accumulation_steps):
            chosen = list(islice(examples, different))
            self.remember(chosen)
            yield [
                replace(example, epoch=example.epoch * plan.copies + copy)
                for copy in range(plan.copies)
                for example in chosen
            ]

    def batch(self, examples: list[Example]) -> Batch:
        """Return the batch of these examples.

        Raises:
            ValueError: if none of the images can be read.
        """
        pixels = [self.fixed_part(example) for example in examples]
        readable = [place for place, part in enumerate(pixels) if part is not None]
        if not readable:
            raise ValueError(f"{self.source.name}: none of the {len(examples)} images of a batch can be read")
        places = [next((at for at in readable if at >= place), readable[0]) for place in range(len(examples))]
        return self.preparation.batch(
            [part for part in (pixels[place] for place in places) if part is not None],
            [examples[place].label for place in places],
            [(examples[place].epoch, examples[place].index) for place in places],
            [NO_PICTURE if place == asked else examples[asked].index for asked, place in enumerate(places)],
        )

    def fixed_part(self, example: Example) -> torch.Tensor | None:
        """Return the image after the fixed part of the augmentation; None if it cannot be read."""
        try:
            return self.preparation.fixed_part(decoded(example.encoded, hex(example.index)))
        except BrokenPicture:
            return None

    def remember(self, examples: list[Example]) -> None:
        """Store the names of the most recent images."""
        for example in examples:
            self.names[example.index] = example.encoded["path"] or ""
        while len(self.names) > NAMES_KEPT:
            del self.names[next(iter(self.names))]

    def describe(self, index: int) -> str:
        """Return the error message of an unreadable image."""
        name = self.names.get(index)
        return f"cannot read the image {shorten(name)}" if name else f"cannot read the image with checksum {index:x}"


def training_pictures(
    source: LabelledPictures | StreamedPictures,
    augmentation: Augmentation,
    to_rgb: bool,
    seed: int,
    views: int = 0,
    num_channels: int | None = None,
) -> TrainingPictures | TrainingStream:
    """Build the dataset of augmented training images, stored or streamed."""
    if isinstance(source, StreamedPictures):
        return TrainingStream(source, augmentation, to_rgb, seed, views, num_channels)
    return TrainingPictures(source, augmentation, to_rgb, seed, views, num_channels)


def read_ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield the same items, with up to `count` items read ahead in a separate thread."""
    nothing = object()
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        waiting = deque(pool.submit(next, items, nothing) for _ in range(count))
        while (item := waiting.popleft().result()) is not nothing:
            waiting.append(pool.submit(next, items, nothing))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
