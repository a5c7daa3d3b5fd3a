"""Prediction of labels or features for any number of images, from options to rows.

    images -> records -> pixels -> predictions -> rows -> table, file, or folder of Parquet files
    inputs.py ----------------->   prediction_rows.py ->  outputs.py   shards.py

The images are divided by index into chunks of equal size: a shard if the output is a folder, or a
batch otherwise. The chunks are assigned to the processes in turn, and a batch never spans two
chunks. The output is therefore bit-identical for any number of processes, even after a restart. A
stream is divided among the workers (shards.py) by `datasets`.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ..conversion.any_checkpoint import resolve
from ..data.splits import load_on_main
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..runtime.distributed import build_accelerator, run_on_main
from .exported_graphs import ExportedModel
from .inputs import (
    ImageRecord,
    ListInput,
    PredictionInput,
    StreamInput,
    build_list_input,
    open_input,
    prepare_images,
)
from .load_model import load_for_inference
from .options import PredictOptions
from .outputs import WRITERS, get_output_columns, print_table, show_progress, write_rows
from .prediction_rows import (
    AutocastFactory,
    PredictionColumns,
    Row,
    build_prediction_columns,
    predict_rows,
)
from .shards import ShardFolder, list_shard_indices


MAX_BATCH_SIZE = 32  # default number of images per forward pass on GPUs


@dataclass(frozen=True)
class Predictor:
    """A model, the image processor of the model, and the settings of a prediction."""

    model: PreTrainedModel
    processor: ViTCLSImageProcessor
    columns: PredictionColumns
    autocast: AutocastFactory
    batch_size: int
    num_workers: int

    def iterate_rows(self, records: Iterator[ImageRecord]) -> Iterator[Row]:
        """Yield a row for each image, in order."""
        images = prepare_images(
            records, self.processor, self.num_workers, num_ahead=2 * self.batch_size
        )
        batches = iter(lambda: list(islice(images, self.batch_size)), [])
        return predict_rows(batches, self.columns, self.model.device, self.autocast)


class PredictionCounts(NamedTuple):
    """Number of images, and number of images without a prediction.

    Both numbers are 0 except on the main process.
    """

    num_images: int
    num_failed: int


def predict_from_options(options: PredictOptions, images: list[Any]) -> list[Row]:
    """Return the rows that `vitcls predict` would write, computed in this process.

    `images` are paths, URLs, folders, encoded bytes, PIL images and arrays. If `images` is empty,
    the options specify the input.
    """
    accelerator = build_accelerator(mixed_precision=options.mixed_precision)
    source = wrap_images(images) if images else open_input(options)
    predictor = build_predictor(options, accelerator)
    return list(predictor.iterate_rows(read_all_records(source)))


def read_all_records(source: PredictionInput) -> Iterator[ImageRecord]:
    """Yield the records of all images."""
    if isinstance(source, StreamInput):
        return source.build_records(source.dataset, count())
    return source.read_records(range(source.num_images))


def build_predictor(options: PredictOptions, accelerator: Accelerator) -> Predictor:
    """Load the model and its image processor on the device, and build a predictor."""
    assert options.model is not None
    loaded = load_for_inference(
        resolve(options.model, options.backend),
        options,
        accelerator,
        use_head=options.features is None,
        max_batch_size=MAX_BATCH_SIZE,
        print_line=accelerator.on_main_process(partial(print, file=sys.stderr)),
    )
    columns = build_prediction_columns(
        model=loaded.model,
        top_k=options.top_k,
        threshold=options.threshold,
        features=options.features,
        feature_dtype=options.feature_dtype,
    )
    return Predictor(
        model=loaded.model,
        processor=loaded.processor,
        columns=columns,
        autocast=accelerator.autocast,
        batch_size=loaded.batch_size,
        num_workers=options.num_workers or get_num_workers(),
    )


def wrap_images(images: Sequence[Any]) -> ListInput:
    """Return an input with images from paths, folders and memory.

    Images in memory are named by index.
    """
    names: list[str] = []
    contents: list[Any] = []
    for index, image in enumerate(images):
        is_path = isinstance(image, str | Path)
        image_input = (
            build_list_input([str(image)]) if is_path else ListInput([str(index)], [image])
        )
        names += image_input.names
        contents += image_input.contents
    return ListInput(names, contents)


def predict_images(options: PredictOptions) -> PredictionCounts:
    """Run the prediction that the options specify, and print or write the rows.

    Raise ValueError or OSError with a single-line message if the images or the model cannot be
    read, or if the output cannot be written.
    """
    accelerator = build_accelerator(mixed_precision=options.mixed_precision)
    source = load_on_main(accelerator, options.dataset or "", partial(open_input, options))
    with accelerator.main_process_first():  # the main process downloads the files
        predictor = build_predictor(options, accelerator)
    is_folder = options.output is not None and options.output.suffix.lower() not in WRITERS
    counts = (predict_to_folder if is_folder else predict_to_file)(
        options, accelerator, source, predictor
    )
    accelerator.end_training()
    return counts if accelerator.is_main_process else PredictionCounts(0, 0)


def get_num_workers() -> int:
    """Return the number of CPU cores per local process, clamped to [1, 8]."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // num_processes))


def predict_to_file(
    options: PredictOptions, accelerator: Accelerator, source: PredictionInput, predictor: Predictor
) -> PredictionCounts:
    """Print a table or write one file. The main process gathers the rows of all processes."""
    if isinstance(source, StreamInput):
        if accelerator.num_processes > 1:
            raise ValueError(
                "`streaming=True` with several processes requires a folder. Set `output` to a "
                "folder"
            )
        records = read_all_records(source)
        num_local_images = None
    else:
        chunks = list_shard_indices(source.num_images, predictor.batch_size)
        ranges = chunks[accelerator.process_index :: accelerator.num_processes]
        records = chain.from_iterable(map(source.read_records, ranges))
        num_local_images = sum(map(len, ranges))
    columns = get_output_columns(predictor.columns.columns)
    is_main = accelerator.is_main_process
    rows = list(show_progress(predictor.iterate_rows(records), "images", num_local_images, is_main))
    if accelerator.num_processes > 1:
        rows = sorted(gather_object(rows), key=lambda row: row["index"])
    if is_main and options.output is None:
        print_table(rows, columns)
    elif is_main and options.output is not None:
        write_rows(rows, columns, options.output)
    return PredictionCounts(len(rows), sum(row["error"] is not None for row in rows))


# A folder of Parquet files ------------------------------------------------------------------------


def predict_to_folder(
    options: PredictOptions, accelerator: Accelerator, source: PredictionInput, predictor: Predictor
) -> PredictionCounts:
    """Write the missing shards of each process, and return the numbers of images of this job."""
    assert options.output is not None
    job, num_jobs = map(int, (options.shard or "1/1").split("/"))
    worker_index = (job - 1) * accelerator.num_processes + accelerator.process_index
    num_workers = num_jobs * accelerator.num_processes
    settings = {
        "shard_size": options.shard_size,
        "features": options.features,
        "feature_dtype": options.feature_dtype,
        "top_k": options.top_k,
        "threshold": options.threshold,
        "mixed_precision": accelerator.mixed_precision,
        "input": run_on_main(accelerator, source.compute_fingerprint),
        "model": compute_model_digest(predictor.model, predictor.processor),
    }
    num_shards = None
    write_shards: Any = write_stream_shards
    if isinstance(source, StreamInput):
        settings["num_workers"] = num_workers
    else:
        num_shards = len(list_shard_indices(source.num_images, options.shard_size))
        write_shards = write_list_shards
    folder = ShardFolder(
        options.output, options.shard_size, json.loads(json.dumps(settings)), num_shards
    )
    folder.open()
    is_shown = accelerator.is_main_process
    shards = gather_object(
        write_shards(folder, worker_index, num_workers, source, predictor, is_shown)
    )
    return PredictionCounts(
        num_images=sum(shard["images"] for shard in shards),
        num_failed=sum(shard["failed"] for shard in shards),
    )


def write_list_shards(
    folder: ShardFolder,
    worker_index: int,
    num_workers: int,
    source: Any,
    predictor: Predictor,
    is_shown: bool,
) -> list[dict[str, Any]]:
    """Write the missing shards of one worker, and return the metadata of each shard."""
    shards = list_shard_indices(source.num_images, folder.shard_size)
    local_shards = shards[worker_index::num_workers]
    files = [folder.get_file(indices.start // folder.shard_size) for indices in local_shards]
    # all are checked before the first image
    metadata = [folder.read_finished(file) for file in files]
    for position in show_progress(range(len(files)), "files", len(files), is_shown):
        if metadata[position] is None:
            rows = list(predictor.iterate_rows(source.read_records(local_shards[position])))
            metadata[position] = folder.write(
                files[position], rows, predictor.columns.columns, num_shards=len(shards)
            )
    return [fields for fields in metadata if fields is not None]


def write_stream_shards(
    folder: ShardFolder,
    worker_index: int,
    num_workers: int,
    source: StreamInput,
    predictor: Predictor,
    is_shown: bool,
) -> list[dict[str, Any]]:
    """Continue the shards of one worker from the state of the stream in its last shard.

    Return the metadata as `write_list_shards`.
    """
    from datasets.distributed import split_dataset_by_node

    stream = split_dataset_by_node(source.dataset, worker_index, num_workers)
    metadata = []
    first_shard = 0
    while (
        finished := folder.read_finished(folder.get_file(first_shard, worker_index))
    ) is not None:
        metadata.append(finished)
        if finished["is_last"]:
            return metadata
        stream.load_state_dict(finished["state"])
        first_shard += 1
    examples = iter(stream)
    indices = count(first_shard * folder.shard_size * num_workers + worker_index, num_workers)
    for shard_index in show_progress(count(first_shard), "files", None, is_shown):
        records = source.build_records(islice(examples, folder.shard_size), indices)
        rows = list(predictor.iterate_rows(records))
        state = stream.state_dict()  # before the next example is read
        next_example = list(islice(examples, 1))
        examples = chain(next_example, examples)
        file = folder.get_file(shard_index, worker_index)
        finished = folder.write(
            file, rows, predictor.columns.columns, is_last=not next_example, state=state
        )
        metadata.append(finished)
        if not next_example:
            break
    return metadata


def compute_model_digest(model: PreTrainedModel, processor: ViTCLSImageProcessor) -> str:
    """Return a digest of what determines predictions: weights, labels and preprocessing."""
    settings = [model.config.id2label, model.config.tasks, processor.to_dict()]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weights in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if isinstance(model, ExportedModel):
        for file in model.files:
            digest.update(file.read_bytes())
    return digest.hexdigest()
