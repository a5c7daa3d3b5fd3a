"""Prediction of labels or features for any number of images, from options to rows.

    images -> records -> pixels -> predictions -> rows -> table or file
    inputs.py ----------------->   prediction_rows.py ->  outputs.py

The images are divided into batches by index, and the batches are assigned to the processes in turn.
The output is therefore bit-identical for any number of processes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console

from ..conversion.open_model import open_model
from ..data.labels import get_heads
from ..data.sources import load_on_main
from ..data.trained_images import is_trained_image, read_trained_keys
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..runtime.distributed import build_accelerator, set_mixed_precision
from ..runtime.errors import format_name_list, warn_on_first_process
from ..runtime.progress import track
from .cuda_graphs import GraphedFunction
from .image_pass import pass_over_images, prepare_batches
from .inputs import ImageRecord, build_record, list_records, open_input, prepare_image
from .load_model import load_for_inference
from .options import PredictOptions
from .outputs import (
    get_output_columns,
    print_table,
    write_rows,
)
from .prediction_rows import (
    FeatureColumns,
    LabelColumns,
    PredictionColumns,
    Row,
    build_checked_rows,
    try_predict,
)


PREDICTION_BATCH_SIZE = 32  # Default number of images per forward pass on GPUs
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LoadedPredictor:
    """A model, the image processor of the model, and the settings of a prediction.

    Threads may share it: it does not change, and neither does what it computes if another command
    sets another precision in this process.
    """

    model: Any
    processor: ViTCLSImageProcessor
    columns: PredictionColumns
    # Function that returns a context manager for a forward pass
    autocast: Callable[[], AbstractContextManager]
    batch_size: int
    num_workers: int
    # Keys of the images that trained the classifier (trained_images.py)
    trained_keys: frozenset[int] = frozenset()

    def iterate_rows(
        self, records: Sequence[ImageRecord], part: slice = slice(None)
    ) -> Iterator[Row]:
        """Yield a row for each image, in order.

        A row contains an error if the image cannot be read, if the model does not support it, or if
        the outputs are not finite.

        Args:
            records: All images.
            part: The batches of this process. Default: all.
        """
        names: dict[int, str] = {}

        def prepare(index: int) -> torch.Tensor | str:
            names[index], content = records[index]
            return prepare_image(self.processor, content, index)

        # Divided into batches first, and then among the processes: rounding depends on which images
        # share a batch, and the output must not depend on the number of processes.
        starts = range(0, len(records), self.batch_size)
        batches = [range(len(records))[start : start + self.batch_size] for start in starts][part]
        compute = GraphedFunction(partial(try_predict, self.columns), self.model.device)
        prepared = prepare_batches(prepare, batches, self.num_workers)
        computed = pass_over_images(compute, prepared, self.model.device, self.autocast)
        empty_row = {**dict.fromkeys(self.columns.columns), "error": None}
        found: dict[int, Row] = {}
        for indices in batches:
            while not found.keys() >= set(indices):  # One batch per shape
                batch, outputs = next(computed)
                found |= {index: {"error": text} for index, text in batch.error_messages.items()}
                rows = build_checked_rows(self.columns, outputs, len(batch.indices))
                found |= dict(zip(batch.indices, rows, strict=True))
            # In the order of the input, not of the shapes.
            for index in indices:
                yield {"index": index, "image": names.pop(index), **empty_row, **found.pop(index)}


def predict_images(options: PredictOptions) -> None:
    """Run the prediction that the options specify, and print or write the rows.

    Raises:
        ValueError, OSError: If the images or the model cannot be read, or the output cannot be
            written; after the rows are written, if no image has a prediction, or not every image
            with `strict`, or a file does not exist. The message is a single line.
    """
    accelerator = build_accelerator(mixed_precision=options.mixed_precision)
    records = load_on_main(options.dataset or "", partial(open_input, options))
    predictor = build_predictor(options, accelerator)
    # On all processes, although only the main process reads the rows
    rows = compute_rows(accelerator, records, predictor)
    failed: list[int] = []  # Indices of the images without a prediction
    num_trained = 0

    def watch_rows() -> Iterator[Row]:
        nonlocal num_trained
        for row in rows:
            if row["error"] is not None:
                failed.append(row["index"])
            elif is_trained_image(records[row["index"]].content, predictor.trained_keys):
                num_trained += 1
            yield row

    num_images = len(records)
    columns = get_output_columns(predictor.columns.columns)
    if accelerator.is_main_process and options.output is None:
        print_table(watch_rows(), columns)
    elif accelerator.is_main_process and options.output is not None:
        write_rows(watch_rows(), columns, options.output)
        print(f"{options.output}: {num_images - len(failed):,} of {num_images:,} images predicted")
    if num_trained:
        warn_on_first_process(
            f"{num_trained:,} of {num_images:,} images trained the model: their predictions measure "
            "nothing. Predict other images, or see the result of the run"
        )
    accelerator.end_training()

    if failed and (options.strict or len(failed) == num_images):
        raise ValueError(
            f"{len(failed):,} of the {num_images:,} images have no prediction. See the column "
            "`error` in the output"
        )
    missing_files = []
    if options.dataset is None:
        named = (records[index] for index in failed)
        missing_files = [name for name, path in named if not os.path.lexists(path)]
    if missing_files:
        raise ValueError(
            f"{len(missing_files):,} of the {num_images:,} images do not exist: "
            f"{format_name_list(missing_files)}. Check the paths"
        )


def build_predictor(options: PredictOptions, accelerator: Accelerator) -> LoadedPredictor:
    """Load the model and its image processor for all processes, in the precision of the options."""
    device = accelerator.device
    with accelerator.main_process_first():  # The main process downloads the files
        predictor = load_predictor(options, device)
    set_mixed_precision(accelerator, options.mixed_precision, predictor.model.config)
    dtype = AUTOCAST_DTYPES.get(accelerator.mixed_precision)
    # The accelerator's own `autocast` follows the accelerators that are built later
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    return replace(predictor, autocast=autocast)


def load_predictor(options: PredictOptions, device: torch.device) -> LoadedPredictor:
    """Load the model and its image processor on a device, to compute in the dtype of the weights."""
    folder = open_model(options.model)
    model, processor, batch_size = load_for_inference(
        folder,
        device,
        use_head=options.features is None,
        batch_size=options.batch_size,
        max_batch_size=PREDICTION_BATCH_SIZE,
    )
    columns: PredictionColumns
    if options.features is None:
        heads = get_heads(model.config, options.threshold)
        columns = LabelColumns(model, heads, options.top_k)
    else:
        columns = FeatureColumns(model, options.features, options.feature_dtype)
    return LoadedPredictor(
        model=model,
        processor=processor,
        columns=columns,
        autocast=nullcontext,
        batch_size=batch_size,
        num_workers=get_num_workers() if options.num_workers is None else options.num_workers,
        trained_keys=read_trained_keys(folder) if options.features is None else frozenset(),
    )


def compute_rows(
    accelerator: Accelerator, records: Sequence[ImageRecord], predictor: LoadedPredictor
) -> Iterator[Row]:
    """Compute the rows of all images, in order.

    With several processes, the main process gathers the rows; otherwise, they are computed while
    the iterator is read.
    """
    console = Console(stderr=True, quiet=not accelerator.is_main_process)
    num_processes = accelerator.num_processes
    rows = track(
        predictor.iterate_rows(records, slice(accelerator.process_index, None, num_processes)),
        "predicting",
        len(records),
        count=lambda row: num_processes,
        console=console,
    )
    # An iterator instead of a list: the file is written while rows are computed, so memory stays
    # small.
    if num_processes == 1:
        return rows
    return iter(sorted(gather_object(list(rows)), key=lambda row: row["index"]))


def wrap_images(images: Sequence[Any]) -> list[ImageRecord]:
    """Build an input of images from paths, folders and memory.

    Images in memory are named by index.
    """
    records: list[ImageRecord] = []
    for index, image in enumerate(images):
        if isinstance(image, str | Path):
            records += list_records([str(image)])
        else:
            records.append(build_record(index, image, Path()))
    return records


def get_num_workers() -> int:
    """Count the CPU cores per local process, clamped to [1, 8]."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // num_processes))
