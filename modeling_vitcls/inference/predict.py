"""The command `vitcls predict`: labels or features of any number of images, from options to rows.

    options -> records -> rows -> table or file
               inputs.py  predictor.py  outputs.py, output_table.py

The batches of `Predictor` are assigned to the processes in turn. The features of the photos are kept
(feature_store.py), so the same command goes on where it stopped, and rows are computed again each time.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice

import pyarrow as pa
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console

from ..data.sources import load_on_main
from ..runtime.distributed import build_accelerator, run_on_main
from ..runtime.errors import format_name_list, warn_on_first_process
from ..runtime.progress import track
from .inputs import ImageRecord, open_input
from .intervals import compute_proportion_interval
from .options import PredictOptions
from .output_table import OutputTable
from .outputs import WRITERS, get_output_columns, print_table, write_csv
from .prediction_rows import Row
from .predictor import Predictor, build_predictor


FURTHER_LABEL = re.compile(r"(label|probability)_\d+")  # Columns with `--top-k`
MIN_DRAWN = 10  # Minimum number of answered random photos for an estimate


@dataclass(frozen=True)
class Answered:
    """What is counted of a photo with an answer."""

    file: str  # The file of its answer
    is_drawn: bool  # Whether a page drew it at random
    is_right: bool  # Whether its predicted label is the person's
    is_trained: bool  # Whether the model was trained on it, as far as is known


def predict_images(options: PredictOptions) -> list[Row]:
    """Run the prediction that the options specify, print or write the rows, and return them.

    Raises:
        ValueError, OSError: If the images or the model cannot be read, or the output cannot be
            written; after the rows are written, if no image has a prediction, or not every image
            with `strict`, or a file does not exist. The message is a single line.
    """
    accelerator = build_accelerator(mixed_precision=options.mixed_precision)
    records, left_out = load_on_main(options.dataset or "", partial(open_input, options))
    with accelerator.main_process_first():  # The main process downloads the files
        predictor = build_predictor(options)
    columns = get_output_columns(predictor.columns.columns)
    if "probability" not in columns and (options.answers or options.review):
        raise ValueError("`answers` and `review` require a model with one label per image")
    rows = compute_rows(accelerator, predictor, records)
    answered: Counter[Answered] = Counter()
    if options.answers:
        columns["source"] = pa.string()
        names = list(predictor.folder.config.id2label.values())
        rows = apply_labels(rows, read_answers_of(options.answers, names), answered)
    if options.output is None:
        summary = list(rows)
        if accelerator.is_main_process:
            print_table(summary, columns)
    else:
        write = WRITERS[options.output.suffix.lower()]
        if write is write_csv:
            write = partial(write_csv, delimiter=options.delimiter)
        table = OutputTable(options.output, columns, write)
        with ExitStack() as stack:
            run_on_main(stack.enter_context, table.reserve(options.overwrite))
            summary = table.write(rows) if accelerator.is_main_process else [*rows]

    num_images = len(records)
    failed = [row["index"] for row in summary if row["error"] is not None]
    num_trained = sum(row["trained"] or False for row in summary if row["error"] is None)
    if accelerator.is_main_process and options.output is not None:
        print(f"{options.output}: {num_images - len(failed):,} of {num_images:,} images predicted")
    if options.answers and accelerator.is_main_process:
        print_answered(summary, answered, num_images - len(failed) - num_trained)
    if left_out:
        warn_on_first_process(
            f"left out: {format_name_list(left_out)}. To predict their images, pass these folders"
        )
    if num_trained:
        warn_on_first_process(
            f"the model was trained on {num_trained:,} of {num_images:,} images: their predictions measure "
            "nothing. Predict other images, or see the result of the run"
        )
    accelerator.end_training()
    check_predicted(options, records, failed)
    return summary


def check_predicted(
    options: PredictOptions, records: Sequence[ImageRecord], failed: list[int]
) -> None:
    """Raise ValueError if no image has a prediction, or not every image with `strict`, or a file does not exist.

    `failed` are the indices of the records without a prediction.
    """
    num_images = len(records)
    if failed and (options.strict or len(failed) == num_images):
        raise ValueError(
            f"{len(failed):,} of the {num_images:,} images have no prediction. See the column "
            "`error` in the output"
        )
    named = [records[index] for index in failed if options.dataset is None]
    missing_files = [name for name, path in named if not os.path.lexists(path)]
    if missing_files:
        raise ValueError(
            f"{len(missing_files):,} of the {num_images:,} images do not exist: "
            f"{format_name_list(missing_files)}. Check the paths"
        )


def print_answered(rows: Sequence[Row], answered: Counter[Answered], num_new: int) -> None:
    """Say how much of a table is a person's, and how much of the rest is right.

    `num_new` is the number of predicted images that did not train the model.
    """
    if not any(row["source"] == "person" for row in rows):
        from ..data.answers import NO_PHOTOS  # imports pandas

        warn_on_first_process(NO_PHOTOS)
    settled, answered = drop_settled(answered)
    print(describe_labels(answered, num_new - settled))


def read_answers_of(files: Sequence[str], class_names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Read the answers of a person, by checksum; labels that are no classes are named."""
    from ..data import answers as pages  # imports pandas

    answers = pages.read_answers(files)
    names = ["", *class_names]
    answers["label"] = pages.match_classes(answers["label"], names)
    if others := {*answers["label"]}.difference(names):
        warn_on_first_process(
            "`answers` has labels that are no classes of the model: "
            f"{pages.format_unknown_labels(others, names)}. Correct them, or train the model with them"
        )
    return answers.to_dict("index")  # type: ignore[no-any-return]


def apply_labels(
    rows: Iterator[Row],
    answers: Mapping[str, Mapping[str, str]],
    answered: Counter[Answered],
) -> Iterator[Row]:
    """Replace the label of photos with a person's, which has no probability, and name its `source`.

    `answered` counts the photos.
    """
    for row in rows:
        row["source"] = "model"
        if answer := answers.get(row["checksum"]):
            label = answer["label"] or None
            answered[
                Answered(
                    file=answer["file"],
                    is_drawn=answer["chosen"] == "random",
                    is_right=row["label"] == label,
                    is_trained=bool(row["trained"]),
                )
            ] += 1
            row |= dict.fromkeys(filter(FURTHER_LABEL.fullmatch, row))
            row.update(label=label, probability=None, source="person")
        yield row


def drop_settled(answered: Counter[Answered]) -> tuple[int, Counter[Answered]]:
    """Drop the photos of files of answers with which the model was trained.

    Of the photos of such a file, those with a class have trained the model, and those of no class have not.
    Whether a photo is left to be counted is then decided by its answer: of those left, the model has none right.

    Returns:
        The number of dropped photos that did not train the model, and the counts of the other photos.
    """
    files = {photo.file for photo in answered if photo.is_trained}
    settled = sum(
        number for photo, number in answered.items() if photo.file in files and not photo.is_trained
    )
    others = {photo: number for photo, number in answered.items() if photo.file not in files}
    return settled, Counter(others)


def describe_labels(answered: Counter[Answered], num_labels: int) -> str:
    """Estimate how many labels are right, of photos that the model was not trained on.

    Args:
        answered: photos of files of answers that did not train the model.
        num_labels: number of labels, without those of photos that trained it or are in other files.

    The accuracy on random photos, plus the share of corrected labels. In 1,500 simulated pages of 60 or 100
    photos, the interval contained the truth in 95 to 97%. The accuracy on random photos alone is too low for
    the photos without an answer, because the least sure ones have one: 61 to 92%.
    """
    num_right = sum(answered[photo] for photo in answered if photo.is_drawn and photo.is_right)
    num_drawn = sum(answered[photo] for photo in answered if photo.is_drawn)
    num_wrong = sum(answered[photo] for photo in answered if not photo.is_right)
    text = f"{answered.total():,} of the {num_labels:,} labels of photos outside the training are a person's"
    if num_drawn < MIN_DRAWN:
        return (
            f"{text}. An estimate of how many are right requires {MIN_DRAWN} answers about random photos that the "
            "model was not trained on, in a file of answers that it was not trained with: write another page "
            "with `--review`"
        )
    bounds = compute_proportion_interval(num_right, num_drawn)
    corrected = num_wrong / num_labels
    share, low, high = (min(1, part + corrected) for part in (num_right / num_drawn, *bounds))
    return (
        f"{text}; of {num_drawn:,} that were drawn at random, the model had {num_right:,} right: "
        f"with those that you have corrected, about {share:.0%} of the labels are right (95% interval: {low:.0%} "
        f"to {high:.0%})"
    )


def compute_rows(
    accelerator: Accelerator, predictor: Predictor, records: Sequence[ImageRecord]
) -> Iterator[Row]:
    """Yield the rows of all processes in order, on each process, while they are computed."""
    index, number = accelerator.process_index, accelerator.num_processes
    batches = predictor.divide(range(len(records)))
    store = predictor.open_store()
    rows = track(
        predictor.iterate_rows(records, batches[index::number], store),
        "predicting",
        len(records),
        count=lambda row: number,
        console=Console(stderr=True, quiet=not accelerator.is_main_process),
    )
    for start in range(0, len(batches), number):
        size = sum(map(len, batches[start : start + number][index : index + 1]))
        yield from gather_object(list(islice(rows, size)))
    if store is not None:
        store.close()
        num_found = sum(gather_object([len(store.found)]))
        if num_found and accelerator.is_main_process:
            print(f"{num_found:,} of {len(records):,} images had passed this encoder before")
