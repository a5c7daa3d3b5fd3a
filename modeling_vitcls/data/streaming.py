"""Streamed training images, read during training without a prior download (`--streaming`).

    shards -> shuffle buffer -> examples of this process -> examples after the completed steps
           -> batches of encoded examples, read ahead by the main process -> decoding and augmentation in workers

If the number of shards is a multiple of the number of processes, each process reads its own shards.
Otherwise, each of the n processes reads all shards and uses every n-th example. The shuffling of
each pass is seeded. After the last example, a process starts a new pass in a different order. The
index of an example is a checksum of the encoded image or of the image path, so an image has the
same index in every pass and every process. The first 10,000 held-out images are read before the
training, and stored in memory without decoding.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ..hub.loading import fall_back_to_cache, is_hub_id
from ..hub.local_paths import is_built_in_dataset
from ..model.heads_vitcls import IGNORED_LABEL
from .batches import Batch, BatchBuilder
from .columns import divide_by_column
from .images import (
    DatasetImages,
    LabeledImages,
    UnreadableImage,
    compute_encoded_content_key,
    decode_image,
    to_encoded_image,
)
from .in_memory import MEMORY_PREFIX
from .labels import (
    UNLABELED,
    Features,
    LabelKind,
    LabelSpace,
    MultiHotLabels,
    find_image_column,
    find_label_columns,
    get_declared_names,
    get_item_type,
    read_label_names,
    read_names,
)
from .options import DataOptions
from .sampling import BatchPlan, derive_seed, draw_numbers
from .sources import (
    KIND_TEXTS,
    READERS,
    OpenedDataset,
    Splits,
    explain_reading_errors,
    open_dataset,
)


MAX_HELD_OUT_IMAGES = 10_000  # maximum number of held-out images of a stream


Row = dict[str, Any]  # values by column
StreamRow = tuple[dict[str, Any], int]  # (column name -> value, image key)


@dataclass(frozen=True)
class Example:
    """An encoded image and its label."""

    encoded_image: dict[str, Any]  # {"path", "bytes"}
    label: Any
    index: int
    epoch: int = 0


@dataclass(frozen=True)
class StreamedImages:
    """Images of one split of a streamed dataset.

    The images whose random number, from 0 to 1, is below `held_out_fraction` are held out.
    """

    name: str
    stream: Any  # an IterableDataset whose images are not decoded
    image_column: str
    reader: "RowReader | None"  # None if labels are not read
    folder: Path
    shuffle_buffer_size: int
    held_out_fraction: float = 0.0
    split_seed: int = 0

    def iterate_examples(
        self, seed: int, process_index: int, num_processes: int, start: int = 0
    ) -> Iterator[Example]:
        """Yield the examples of one process indefinitely, starting at example `start`.

        `Example.epoch` is the number of completed passes. Raise ValueError if a label is not one of
        the classes, or if a process has no examples.
        """
        pass_index = 0
        while True:
            num_examples = 0
            for example in self.iterate_pass(seed, pass_index, process_index, num_processes):
                num_examples += 1
                if num_examples > start:
                    yield replace(example, epoch=pass_index)
            if num_examples == 0:
                raise ValueError(
                    f"{self.name} has no training image for process {process_index} of "
                    f"{num_processes}. Add images or start fewer processes"
                )

            # all passes of a process have the same length
            num_passes, remaining_start = divmod(start, num_examples)
            pass_index += max(num_passes, 1)
            start = remaining_start if num_passes else 0

    def iterate_pass(
        self, seed: int, pass_index: int, process_index: int, num_processes: int
    ) -> Iterator[Example]:
        """Yield the examples of one process in one shuffled pass."""
        stream = self.stream
        has_own_shards = stream.num_shards % num_processes == 0
        if has_own_shards and num_processes > 1:
            stream = stream.shard(num_processes, process_index)
        stream = stream.shuffle(
            seed=derive_seed(seed, pass_index), buffer_size=self.shuffle_buffer_size
        )
        rows = self.iterate_rows(stream, is_held_out=False)
        local_rows = rows if has_own_shards else islice(rows, process_index, None, num_processes)
        return self.build_examples(local_rows)

    def read_first(self, num_images: int, is_held_out: bool = False) -> LabeledImages:
        """Return the first images in the order of the stream, stored in memory without decoding.

        They are the first that are held out (`is_held_out`) or not. Raise ValueError if there are
        none.
        """
        rows = self.iterate_rows(self.stream, is_held_out)
        examples = list(islice(self.build_examples(rows), num_images))
        if not examples:
            raise ValueError(
                f"{self.name} has no images for evaluation. Set a larger `held_out_fraction`, or "
                "remove the evaluation split"
            )
        labels: Any = [example.label for example in examples]
        if isinstance(labels[0], list):
            labels = MultiHotLabels.from_indices(map(np.flatnonzero, labels), len(labels[0]))
        return LabeledImages(
            DatasetImages.from_list([example.encoded_image for example in examples], self.folder),
            labels,
            keys=np.array([example.index for example in examples], np.uint64),
        )

    def draw(self, num_images: int, seed: int = 0) -> LabeledImages:
        """Return images drawn from the shuffle buffer."""
        stream = self.stream.shuffle(seed=seed, buffer_size=self.shuffle_buffer_size)
        return replace(self, stream=stream).read_first(num_images)

    def iterate_rows(self, stream: Any, is_held_out: bool) -> Iterator[StreamRow]:
        """Yield the column values and the image key of each row.

        The rows are those that are held out, or those that are not.

        The image column contains inputs of `decode_image`.
        """
        for values in stream:
            encoded_image = to_encoded_image(values[self.image_column], self.folder)
            key = compute_encoded_content_key(encoded_image)
            (number,) = draw_numbers(np.array([key], np.uint64), self.split_seed)
            if (int(number) / 2**64 < self.held_out_fraction) == is_held_out:
                yield values | {self.image_column: encoded_image}, key

    def build_examples(self, rows: Iterable[StreamRow]) -> Iterator[Example]:
        """Yield an `Example` for each row. If labels are read, rows without a label are skipped."""
        for values, index in rows:
            encoded_image = values[self.image_column]
            label = IGNORED_LABEL
            if self.reader is not None:
                label = self.reader.read(
                    values, f"{self.name}: the image {encoded_image['path'] or hex(index)}"
                )
            if self.reader is None or label != IGNORED_LABEL:
                yield Example(encoded_image, label, index)


# Labels -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowReader:
    """The labels of a row of one split."""

    space: LabelSpace
    declared: dict[str, tuple[str, ...] | None]  # by column
    separator: str | None

    def read(self, row: Row, row_name: str) -> Any:
        """Return the label of a row. Raise ValueError if it is not one of the classes."""
        names = {
            column: read_names(
                [row[column]],
                self.declared[column] or classes,
                self.declared[column] is not None,
                self.separator,
                has_vectors=False,
            )
            for column, classes in self.space.columns.items()
        }
        return self.space.index(names, row_name)[0]


# Opening ------------------------------------------------------------------------------------------


def open_streams(options: DataOptions, use_labels: bool) -> Splits:
    """Open the splits of a dataset as `StreamedImages`.

    Raise ValueError if the dataset cannot be read, has no image or label column, or has unknown
    classes, and OSError if the dataset cannot be found.
    """
    import datasets

    path = Path(options.dataset)
    is_on_hub = is_hub_id(options.dataset) and not path.exists()
    if options.dataset.startswith(MEMORY_PREFIX) or is_built_in_dataset(options.dataset):
        raise ValueError(f"{options.dataset} is always loaded into memory. Remove `streaming=True`")
    if is_on_hub or (path.is_file() and path.suffix in (".parquet", ".tar")):
        arguments = (
            {"path": options.dataset}
            if is_on_hub
            else {"path": READERS[path.suffix], "data_files": str(path)}
        )
        with (
            fall_back_to_cache(options.dataset, "dataset"),
            explain_reading_errors(options.dataset),
        ):
            streams = datasets.load_dataset(**arguments, streaming=True)
        opened = OpenedDataset(options.dataset, path.parent, streams)
    else:
        opened = open_dataset(options.dataset, use_labels)
    streams = opened.splits
    facts: dict[str, str] = {}
    if all(isinstance(split, datasets.Dataset) for split in streams.values()):
        stored, facts = divide_by_column(
            streams, options.dataset, options.split_column, options.label_column or ()
        )
        streams = {name: split.to_iterable_dataset() for name, split in stored.items()}
    elif options.split_column is not None:
        raise ValueError(
            "`split_column` requires all rows, which `streaming=True` does not read. Remove one of "
            "the two flags"
        )
    features_by_split = {
        split: read_features(stream, options.dataset) for split, stream in streams.items()
    }
    features = next(iter(features_by_split.values()))
    image_column = find_image_column(
        options.dataset, features, options.image_column, options.label_column
    )

    def read_labels(column: str) -> Iterable[Any]:
        item_type = get_item_type(features[column])
        has_numbers = item_type is not None and getattr(item_type, "dtype", "") != "string"
        if get_declared_names(features[column]) or (options.label_names and not has_numbers):
            return []  # no pass over the rows
        return read_label_column(streams, column, options.dataset)

    readers: dict[str, RowReader] = {}
    columns = [image_column]
    label_space = UNLABELED
    if use_labels:
        tables = {
            split: SimpleNamespace(features=found) for split, found in features_by_split.items()
        }
        label_columns = find_label_columns(options.dataset, tables, options.label_column)
        columns += label_columns
        kind: LabelKind = "multi_task" if len(columns) > 2 else "single_label_classification"
        classes = {}
        for name in label_columns:
            parts = {split: found[name] for split, found in features_by_split.items()}
            cells = {split: [] for split in parts} | {next(iter(parts)): list(read_labels(name))}
            classes[name], _, has_lists = read_label_names(
                cells, parts, options.dataset, options.label_separator, options.label_names
            )
            if has_lists or get_item_type(features[name]) is not None:
                kind = "multi_label_classification"
        label_space = LabelSpace(kind, classes)
        facts["labels"] = KIND_TEXTS[kind]
        for split, found in features_by_split.items():
            declared = {name: get_declared_names(found[name]) for name in label_columns}
            readers[split] = RowReader(label_space, declared, options.label_separator)
    images_by_split = {}
    for split, stream in streams.items():
        if isinstance(features[image_column], datasets.Image):
            stream = stream.cast_column(image_column, datasets.Image(decode=False))
        images_by_split[split] = StreamedImages(
            name=opened.name,
            stream=stream.select_columns(columns),
            image_column=image_column,
            reader=readers.get(split),
            folder=opened.folder,
            shuffle_buffer_size=options.shuffle_buffer,
        )
    return Splits(opened.name, label_space, images_by_split, list(streams), facts)


def read_label_column(streams: Any, column: str, dataset: str) -> Iterator[Any]:
    """Yield the labels of all splits of a dataset that does not declare its classes.

    Images are not decoded. Raise ValueError for WebDataset shards on the Hub, of which all images
    would be downloaded.
    """
    for stream in streams.values():
        if "__url__" in (stream.features or {}) and not Path(dataset).exists():
            raise ValueError(
                f"{dataset} does not declare the classes of {column!r}. Set `label_names`"
            )
        for row in stream.select_columns([column]):
            yield row[column]


def read_features(stream: Any, dataset: str) -> Features:
    """Return the declared column types of a dataset or, without them, those of the first row."""
    import datasets

    if stream.features is not None:
        return stream.features
    if not (rows := list(stream.take(1))):
        raise ValueError(f"{dataset} is empty. Add images")
    return datasets.Dataset.from_list(rows).features


# Training -----------------------------------------------------------------------------------------


@dataclass
class TrainingStream:
    """Augmented training images of a stream, with the interface of `TrainingImages`.

    An unreadable image is replaced with the next readable image in the batch.
    """

    source: StreamedImages
    builder: BatchBuilder

    def iterate_keys(
        self, plan: BatchPlan, process_index: int, first_step: int
    ) -> Iterator[list[Example]]:
        """Yield the encoded examples of each batch of one process, starting at `first_step`.

        A thread reads ahead.
        """
        first_batch = first_step * plan.accumulation_steps
        last_batch = plan.num_steps * plan.accumulation_steps
        start = first_batch * plan.batch_size
        examples = self.source.iterate_examples(plan.seed, process_index, plan.num_processes, start)
        batches = (list(islice(examples, plan.batch_size)) for _ in range(first_batch, last_batch))
        return read_ahead(batches, num_items=4)

    def __getitem__(self, examples: list[Example]) -> Batch:
        """Build a batch from encoded examples. Raise ValueError if no image can be read."""
        # position of each readable image in the batch -> pixels
        pixels: dict[int, torch.Tensor] = {}
        errors: dict[int, str] = {}
        for position, example in enumerate(examples):
            try:
                image = decode_image(example.encoded_image, f"with checksum {example.index:x}")
                pixels[position] = self.builder.prepare_image(image)
            except UnreadableImage as error:
                errors[example.index] = str(error)

        if not pixels:
            raise ValueError(
                f"{self.source.name}: none of the {len(examples)} images of a batch can be read. "
                "Check the dataset"
            )

        first = min(pixels)  # replaces images after the last readable image
        used_positions = [
            next((readable for readable in pixels if readable >= position), first)
            for position in range(len(examples))
        ]
        used_examples = [examples[position] for position in used_positions]

        return self.builder.build(
            [pixels[position] for position in used_positions],
            [example.label for example in used_examples],
            [(example.epoch, example.index) for example in used_examples],
            errors,
        )


def read_ahead(items: Iterator[Any], num_items: int) -> Iterator[Any]:
    """Yield the items of an iterator; a thread reads up to `num_items` items ahead."""
    sentinel = object()
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        futures = deque(pool.submit(next, items, sentinel) for _ in range(num_items))
        while (item := futures.popleft().result()) is not sentinel:
            futures.append(pool.submit(next, items, sentinel))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
