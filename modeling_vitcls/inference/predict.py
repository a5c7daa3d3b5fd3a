"""The command `vitcls predict`: labels or features of any number of images, from options to rows.

    options -> records -> rows -> table or file
               inputs.py  predictor.py  outputs.py

The batches of `Predictor` are assigned to the processes in turn.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console

from ..data.sources import load_on_main
from ..data.trained_images import is_trained_image
from ..runtime.distributed import build_accelerator
from ..runtime.errors import format_name_list, warn_on_first_process
from ..runtime.progress import track
from .inputs import ImageRecord, open_input
from .options import PredictOptions
from .outputs import (
    get_output_columns,
    print_table,
    write_rows,
)
from .prediction_rows import Row
from .predictor import Predictor, build_predictor


def predict_images(options: PredictOptions) -> None:
    """Run the prediction that the options specify, and print or write the rows.

    Raises:
        ValueError, OSError: If the images or the model cannot be read, or the output cannot be
            written; after the rows are written, if no image has a prediction, or not every image
            with `strict`, or a file does not exist. The message is a single line.
    """
    accelerator = build_accelerator(mixed_precision=options.mixed_precision)
    records = load_on_main(options.dataset or "", partial(open_input, options))
    with accelerator.main_process_first():  # The main process downloads the files
        predictor = build_predictor(options)
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


def compute_rows(
    accelerator: Accelerator, records: Sequence[ImageRecord], predictor: Predictor
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
