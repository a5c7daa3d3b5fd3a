"""Data sets that are read while training on them, without being downloaded or kept (`--streaming`).

    shards -> shuffled in a buffer -> this process's share -> skipped up to the step of a restart
           -> batches of undecoded examples, read ahead by the main process -> decoded and augmented by workers

Each process reads its own shards where these divide evenly among the processes, else it takes every n-th example of
all. The order is a function of the seed; a process that comes to the end of its share starts again, in another order.
An example's index is a checksum of its picture as it is encoded (or of its path), so that a picture keeps its index
in every pass and on any process.
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


NAMES_KEPT = 10_000  # of the examples read last, to name broken ones
BATCHES_AHEAD = 4
HELD_OUT_PICTURES = 10_000  # at most so many are kept for evaluation where the stream has no split for it


@dataclass(frozen=True)
class Example:
    """One picture, not decoded yet."""

    encoded: dict[str, Any]  # {"path", "bytes"}
    label: Any
    index: int
    epoch: int = 0


@dataclass(frozen=True)
class StreamedPictures:
    """One split of a streamed data set, without its held-out part."""

    name: str
    stream: Any  # an IterableDataset, its pictures not decoded
    image_column: str
    reader: LabelReader | None  # None: without labels
    folder: Path
    shuffle_buffer: int
    held_out: HeldOutPart | None = None

    @property
    def label_space(self) -> LabelSpace:
        """What the labels mean."""
        return UNLABELLED if self.reader is None else self.reader.space

    def examples(self, seed: int, process: int, num_processes: int, start: int = 0) -> Iterator[Example]:
        """The endless sequence of one process, from its `start`-th example on; `epoch` counts the passes.

        Raises:
            ValueError: for an example without a label, or a process without examples.
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
            passes, rest = divmod(start, length)  # all passes of a process are of one length
            number, start = (number + passes, rest) if passes else (number + 1, 0)

    def one_pass(self, seed: int, number: int, process: int, num_processes: int) -> Iterator[Example]:
        """One process's share of the data set, once, shuffled."""
        stream = self.stream
        by_shards = stream.num_shards % num_processes == 0
        if by_shards and num_processes > 1:
            stream = stream.shard(num_processes, process)
        stream = stream.shuffle(seed=seed_for(seed, number), buffer_size=self.shuffle_buffer)
        rows = ((row, index) for row, index in self.indexed(stream) if not self.is_held_out(index))
        mine = rows if by_shards else islice(rows, process, None, num_processes)
        return (self.example(row, index) for row, index in mine)

    def held_out_pictures(self) -> LabelledPictures:
        """The held-out part, encoded, in the order of the stream; all of the stream where there is no such part.

        Of the part, the first `HELD_OUT_PICTURES` are kept and nothing behind them is read; training leaves out all.
        """
        rows = self.indexed(self.stream)
        if self.held_out is not None:
            rows = islice((pair for pair in rows if self.is_held_out(pair[1])), HELD_OUT_PICTURES)
        kept = [self.example(row, index) for row, index in rows]
        if not kept:
            raise ValueError(f"{self.name}: no image is held out: raise --held-out-fraction")
        return LabelledPictures(Examples([part.encoded for part in kept], self.folder), [part.label for part in kept])

    def is_held_out(self, index: int) -> bool:
        """Whether a picture is kept out of training."""
        return self.held_out is not None and self.held_out.holds(index)

    def indexed(self, stream: Any) -> Iterator[tuple[dict[str, Any], int]]:
        """Rows, their pictures in the form of `decoded`, with the pictures' keys."""
        for row in stream:
            encoded = as_encoded(row[self.image_column], self.folder)
            yield row | {self.image_column: encoded}, compute_example_key(encoded, self.folder)

    def example(self, row: dict[str, Any], index: int) -> Example:
        """A row with its label read."""
        encoded = row[self.image_column]
        where = f"{self.name}: the image {encoded['path'] or hex(index)}"
        label = IGNORED_LABEL if self.reader is None else self.reader.read(row, where)
        return Example(encoded, label, index)


# Opening -------------------------------------------------------------------------------------------------------------


def open_streams(options: DataOptions, labelled: bool = True) -> dict[str, StreamedPictures]:
    """The splits of a data set, by name.

    Raises:
        ValueError: if it cannot be found, has no column of images or labels, or does not say what its labels are.
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
    """The types of a stream's columns: the declared ones, else those of its first row."""
    import datasets

    if stream.features is not None:
        return stream.features
    try:
        return datasets.Dataset.from_list([next(iter(stream))]).features
    except StopIteration:
        raise ValueError(f"{options.dataset} is empty") from None


# Training ------------------------------------------------------------------------------------------------------------


class TrainingStream:
    """Augmented training pictures of a stream; used as `TrainingPictures` is.

    A picture that cannot be read is replaced by the next one of its batch that can.
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
        """`views`: how many augmented views of a picture there are; 0 makes a new one for each pass."""
        self.source = source
        self.preparation = Preparation(augmentation, to_rgb, seed, views, num_channels)
        self.names: dict[int, str] = {}

    def keys(self, plan: BatchPlan, process: int, first_step: int) -> Iterator[list[Example]]:
        """The batches of one process from a step on, undecoded.

        Raises:
            ValueError: for copies that do not fit a batch, and what `StreamedPictures.examples` raises.
        """
        if plan.batch_size % plan.copies:
            raise ValueError(
                f"--repeated-augmentation {plan.copies} does not divide --batch-size {plan.batch_size}: choose others"
            )
        return read_ahead(self.batches(plan, process, first_step), BATCHES_AHEAD)

    def batches(self, plan: BatchPlan, process: int, first_step: int) -> Iterator[list[Example]]:
        """The same, read when asked for."""
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
        """The batch of these examples.

        Raises:
            ValueError: if none of them can be read.
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
        """The picture before anything random; None if it cannot be read."""
        try:
            return self.preparation.fixed_part(decoded(example.encoded, hex(example.index)))
        except BrokenPicture:
            return None

    def remember(self, examples: list[Example]) -> None:
        """Note the names of the pictures read last."""
        for example in examples:
            self.names[example.index] = example.encoded["path"] or ""
        while len(self.names) > NAMES_KEPT:
            del self.names[next(iter(self.names))]

    def describe(self, index: int) -> str:
        """What is known of a broken picture."""
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
    """Augmented training pictures, stored or streamed."""
    if isinstance(source, StreamedPictures):
        return TrainingStream(source, augmentation, to_rgb, seed, views, num_channels)
    return TrainingPictures(source, augmentation, to_rgb, seed, views, num_channels)


def read_ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """The same items, up to `count` of them read before they are asked for, in a thread of their own."""
    nothing = object()
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        waiting = deque(pool.submit(next, items, nothing) for _ in range(count))
        while (item := waiting.popleft().result()) is not nothing:
            waiting.append(pool.submit(next, items, nothing))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
