"""Prediction of labels or features for any number of images, from options to rows.

    images -> records -> pixels -> predictions -> rows -> table, file, or folder of Parquet files
    inputs.py ----------------->   prediction_rows.py ->  outputs.py

The images are divided by index into chunks of equal size. A chunk is a shard if the output is a folder, or a batch
otherwise. The chunks are assigned to the processes in turn, and a batch never spans two chunks. The output is
therefore bit-identical for any number of processes, even after a restart.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ..distributed import build_accelerator, run_on_main
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..options import PredictOptions
from .inputs import ListInput, PredictionInput, PreparedImage, build_list_input, open_input, prepare_images
from .load_model import load_model
from .outputs import (
    WRITERS,
    Progress,
    ShardFolder,
    get_output_columns,
    iterate_shards,
    print_table,
    send_heartbeats,
    write_rows,
)
from .prediction_rows import AutocastFactory, PredictionColumns, Row, build_prediction_columns, predict_rows


@dataclass(frozen=True)
class Predictor:
    """A model, the image processor of the model, and the settings of a prediction."""

    model: PreTrainedModel
    processor: ViTCLSImageProcessor
    columns: PredictionColumns
    autocast: AutocastFactory
    batch_size: int
    num_workers: int

    def iterate_rows(self, source: PredictionInput, ranges: Iterable[range], chunk_size: int) -> Iterator[Row]:
        """Yield a row for each image in the index ranges, in order. A batch does not span two chunks."""
        records = source.read_records(ranges)
        images = prepare_images(records, self.processor, self.num_workers, num_ahead=2 * self.batch_size)
        batches = iterate_batches(images, self.batch_size, chunk_size)
        return predict_rows(batches, self.columns, self.model.device, self.autocast)


@dataclass(frozen=True)
class PredictionCounts:
    """Number of images, and number of images without a prediction. Both numbers are 0 except on the main process."""

    num_images: int
    num_failed: int


def predict(
    model: PreTrainedModel,
    processor: ViTCLSImageProcessor,
    images: Any,
    top_k: int | None = None,
    threshold: float = 0.5,
    features: str | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
) -> list[Row]:
    """Predict labels or compute features of images on the device of the model. For notebooks and other programs.

    Args:
        model: a vitcls model.
        processor: the image processor of the model.
        images: a path, a URL, or a list of paths, URLs, encoded bytes, PIL images and arrays. The path of a folder
            selects all images in the folder.
        top_k, threshold, features: see the flags of `vitcls predict`.
        batch_size: number of images per forward pass.
        num_workers: number of threads that preprocess images. The default is the number of CPU cores, but at most 8.

    Returns:
        A dict for each image: `index`, `image` (the path or index), the columns listed in prediction_rows.py, and
        `error`, which is an error message or None.

    Raises:
        ValueError: if there are no images, or if the model does not support the requested labels or features.
    """
    source = wrap_images([images] if isinstance(images, str | Path) else images)
    columns = build_prediction_columns(model, top_k, threshold, features)
    predictor = Predictor(model, processor, columns, nullcontext, batch_size, num_workers or get_num_workers())
    was_training = model.training
    model.eval()
    try:
        return collect_rows(predictor, source)
    finally:
        model.train(was_training)


def predict_from_options(options: PredictOptions, images: list[Any]) -> list[Row]:
    """Return the rows that `vitcls predict` would write, computed in this process. `images` has the same types as in
    `predict`. If `images` is empty, the options specify the input."""
    accelerator = build_accelerator(mixed_precision=options.mixed_precision)
    source = wrap_images(images) if images else open_input(options)
    return collect_rows(build_predictor(options, accelerator), source)


def collect_rows(predictor: Predictor, source: PredictionInput) -> list[Row]:
    """Return the rows of all images. Raise ValueError if the number of images is unknown, as for a stream."""
    if source.num_images is None:
        raise ValueError("cannot return the rows of a stream, because its length is unknown. Disable streaming")
    return list(predictor.iterate_rows(source, [range(source.num_images)], chunk_size=source.num_images))


def build_predictor(options: PredictOptions, accelerator: Accelerator) -> Predictor:
    """Load the model and the image processor, and build a predictor on the device of the accelerator."""
    model, processor = load_model(options.model, use_head=options.features is None, fit=options.fit)
    return Predictor(
        model=model.to(accelerator.device),
        processor=processor,
        columns=build_prediction_columns(model, options.top_k, options.threshold, options.features),
        autocast=accelerator.autocast,
        batch_size=options.batch_size,
        num_workers=options.num_workers or get_num_workers(),
    )


def wrap_images(images: Sequence[Any]) -> ListInput:
    """Return an input with images from paths, folders and memory. Images in memory are named by index."""
    if not images:
        raise ValueError("prediction requires images, but the list is empty. Pass at least one image")
    names: list[str] = []
    contents: list[Any] = []
    for index, image in enumerate(images):
        is_path = isinstance(image, str | Path)
        image_input = build_list_input([str(image)]) if is_path else ListInput([str(index)], [image])
        names += image_input.names
        contents += image_input.contents
    return ListInput(names, contents)


def predict_images(options: PredictOptions) -> PredictionCounts:
    """Run the prediction that the options specify, and print or write the rows. Raise ValueError or OSError with a
    single-line message if the images or the model cannot be read, or if the output cannot be written."""
    accelerator = build_accelerator(mixed_precision=options.mixed_precision)
    with accelerator.main_process_first():  # the main process downloads the files
        source = open_input(options)
        predictor = build_predictor(options, accelerator)
    is_folder = options.output is not None and options.output.suffix.lower() not in WRITERS
    counts = (predict_to_folder if is_folder else predict_to_file)(options, accelerator, source, predictor)
    accelerator.end_training()
    return counts


def get_num_workers() -> int:
    """Return the number of threads per process: the number of CPU cores per local process, clamped to [1, 8]."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // num_processes))


def iterate_batches(
    images: Iterator[PreparedImage], batch_size: int, chunk_size: int
) -> Iterator[list[PreparedImage]]:
    """Yield batches of `batch_size` images. The last batch of each chunk may be smaller."""
    for _, group in groupby(images, key=lambda image: image.record.index // chunk_size):
        while batch := list(islice(group, batch_size)):
            yield batch


# A table or a file ---------------------------------------------------------------------------------------------------


def predict_to_file(
    options: PredictOptions, accelerator: Accelerator, source: PredictionInput, predictor: Predictor
) -> PredictionCounts:
    """Print a table or write one file. The main process gathers the rows of all processes."""
    chunk_size = options.batch_size
    chunks = iterate_shards(source.num_images, chunk_size)
    ranges = islice(chunks, accelerator.process_index, None, accelerator.num_processes)
    rows = gather_rows(predictor.iterate_rows(source, ranges, chunk_size), chunk_size, accelerator)
    columns = get_output_columns(predictor.columns.columns)
    with Progress(source.num_images, is_shown=accelerator.is_main_process) as progress:
        rows = progress.track_rows(rows)
        if not accelerator.is_main_process:
            for _ in rows:
                pass  # the rows are gathered on the main process
        elif options.output is None:
            table_rows = list(rows)
        else:
            write_rows(rows, columns, options.output)
    if not accelerator.is_main_process:
        return PredictionCounts(0, 0)
    if options.output is None:
        print_table(table_rows, columns)
    return PredictionCounts(progress.num_images, progress.num_failed)


def gather_rows(rows: Iterator[Row], chunk_size: int, accelerator: Accelerator) -> Iterator[Row]:
    """Yield the rows of all processes in order. In each round, one chunk per process is gathered."""
    if accelerator.num_processes == 1:
        yield from rows
        return
    chunks = (list(group) for _, group in groupby(rows, key=lambda row: row["index"] // chunk_size))
    while any(gathered_chunks := gather_object([next(chunks, [])])):
        for chunk in gathered_chunks:
            yield from chunk


# A folder of Parquet files -------------------------------------------------------------------------------------------


def predict_to_folder(
    options: PredictOptions, accelerator: Accelerator, source: PredictionInput, predictor: Predictor
) -> PredictionCounts:
    """Write the missing shards, which are divided among the processes. The main process polls until all shards exist,
    because a collective operation would time out if a process is slow. Raise OSError if a process ends before its
    shards are written."""
    assert options.output is not None
    folder = ShardFolder(options.output, options.shard_size)
    num_images, finished_shards = open_shard_folder(folder, options, accelerator, source, predictor)
    shards = iterate_shards(num_images, folder.shard_size)
    missing_shards = (indices for indices in shards if indices.start // folder.shard_size not in finished_shards)
    local_shards: Iterable[range] = islice(missing_shards, accelerator.process_index, None, accelerator.num_processes)
    num_local_images = None
    if num_images is not None:
        local_shards = list(local_shards)
        num_local_images = sum(map(len, local_shards))
    columns = get_output_columns(predictor.columns.columns)
    with (
        send_heartbeats(folder.get_heartbeat_file(accelerator.process_index)),
        Progress(num_local_images, is_shown=accelerator.is_main_process) as progress,
    ):
        accelerator.wait_for_everyone()  # all processes have created a heartbeat file
        rows = progress.track_rows(predictor.iterate_rows(source, local_shards, folder.shard_size))
        for shard_index, shard in groupby(rows, key=lambda row: row["index"] // folder.shard_size):
            write_rows(shard, columns, folder.get_shard_file(shard_index))
        if not accelerator.is_main_process:
            return PredictionCounts(0, 0)
        if num_images is None:  # the end of the stream has been reached
            num_images = source.num_images or 0
            folder.record_num_images(num_images)
        folder.wait_for_shards(num_images, accelerator.num_processes)
    return PredictionCounts(*folder.count_rows(num_images))


def open_shard_folder(
    folder: ShardFolder,
    options: PredictOptions,
    accelerator: Accelerator,
    source: PredictionInput,
    predictor: Predictor,
) -> tuple[int | None, set[int]]:
    """Create the output folder, or check that an existing folder belongs to the same prediction. Return the number of
    images, which is None if unknown, and the indices of the finished shards."""
    fingerprint = source.compute_fingerprint()

    def open_folder() -> tuple[int | None, set[int]]:
        num_images = folder.open(
            {
                "features": options.features,
                "top_k": options.top_k,
                "threshold": options.threshold,
                "mixed_precision": accelerator.mixed_precision,
                "input": fingerprint,
                "model": compute_model_digest(predictor.model, predictor.processor),
            }
        )
        return source.num_images if num_images is None else num_images, folder.list_shards()

    num_images, finished_shards = run_on_main(accelerator, open_folder)
    if any(process_fingerprint != fingerprint for process_fingerprint in gather_object([fingerprint])):
        raise ValueError(
            "prediction requires the same images on all machines, but the images differ. Copy the images to all "
            "machines again"
        )
    return num_images, finished_shards


def compute_model_digest(model: PreTrainedModel, processor: ViTCLSImageProcessor) -> str:
    """Return a digest of all weights, labels and preprocessing settings, which determine the predictions."""
    settings = [model.config.id2label, model.config.tasks, processor.to_dict()]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weights in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
