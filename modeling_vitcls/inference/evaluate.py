"""Evaluation of a saved model, from options to printed and written results.

options -> model, data -> labels matched by name -> Evaluator (evaluator.py) -> tables, and a JSON file

If the dataset has no split for evaluation, the images that the model's run held out are evaluated (data/held_out.py).
A warning is printed if the model may have been trained on evaluated images.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ..configuration_vitcls import ViTCLSConfig
from ..data.held_out import RECORD, RESULTS_FILE, HeldOutRecord, digest_keys, read_record
from ..data.images import LabelledPictures
from ..data.labels import LabelKind, LabelSpace, labels_of
from ..data.splits import load_evaluation_data
from ..distributed import build_accelerator
from ..files import write_json
from ..heads_vitcls import IGNORED_LABEL
from ..hub.card_results import build_class_tables, build_metric_rows
from ..hub.loading import MODEL_FILES, get_model_folder
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..options import EvaluateOptions
from ..system import device_name, get_versions
from .evaluator import Evaluator, HeldOutBatch, KeptBatches
from .load_model import CLASSES, Classifier, check_is_vitcls
from .metrics import scalars


SECONDS_BETWEEN_LINES = 10.0  # seconds between progress lines if the output is not a terminal


def evaluate_checkpoint(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate a saved model, print the results, write them to `--output` if it is set, and return them.

    Raises:
        ValueError: if the model type is not supported, the split does not exist or is not the split of the model's
            run, the model does not have all labels of the dataset, or too many images are unreadable.
        OSError: if the checkpoint cannot be found or read, or the output cannot be written.
    """
    accelerator = build_accelerator(mixed_precision=options.mixed_precision)
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True, highlight=False)
    if options.output is not None:  # fails before the evaluation if the folder cannot be created
        options.output.parent.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():  # downloads once
        folder = get_model_folder(options.model, [*MODEL_FILES, RESULTS_FILE])
        model = load_classifier(options.model, folder).to(accelerator.device).eval()
        processor = ViTCLSImageProcessor.from_pretrained(folder)
        record = read_record(folder)
        label_space, pictures, split, part = load_evaluation_data(options.data, options.split, record)
    problem = None if part is None else describe_unknown_split(options.model, record, pictures)
    if problem is not None:
        console.print(f"WARNING: {problem}", style="bold yellow", markup=False)
    known = labels_of(model.config)
    evaluator = Evaluator(
        relabelled(pictures, label_space, known),
        processor,
        known,
        options.batch_size,
        options.data.num_workers,
        accelerator,
        options.data.max_broken_images,
        warn=lambda message: console.print(f"WARNING: {message}", style="bold yellow", markup=False),
        num_channels=model.config.num_channels,
    )
    started = time.perf_counter()
    metrics = evaluator(model, watch=progress(console, accelerator))
    seconds = time.perf_counter() - started

    asked = {
        "model": options.model,
        "dataset": options.data.dataset,
        "split": split,
        "held_out_part": None if part is None else str(part),
        "is_recorded_part": None if part is None else problem is None,
    }
    results = asked | scalars(metrics) | facts(accelerator, metrics["num_images"], seconds) | metrics
    show(results, model.config, console)
    if options.output is not None and accelerator.is_main_process:
        write_json(options.output, results)
        console.print(f"saved {options.output}", markup=False)
    accelerator.end_training()
    return results


def describe_unknown_split(model: str, record: HeldOutRecord | None, held_out: LabelledPictures) -> str | None:
    """Return why held-out images may be images that the model was trained on; None if its run held out the same ones.

    Args:
        model: the model as the user named it.
        record: what the model's run recorded.
        held_out: the images that `load_evaluation_data` chose.
    """
    risk = "it may have been trained on images that are evaluated here"
    if record is None:
        return f"{model} has no record of its held-out images ({RECORD!r} in {RESULTS_FILE}): {risk}"
    if record.part is None:
        return f"the run of {model} held out the split {record.split!r}, and this data set has no such split: {risk}"
    if digest_keys(held_out.pictures.keys()) == record.sha256:
        return None
    return (
        f"the {len(held_out):,} held-out images are not the {record.num_images:,} that the run of {model} held out: "
        "the data set has changed or is another one. New images are fine, but the model may have been trained on "
        "images that were renamed or re-encoded since"
    )


def facts(accelerator: Accelerator, num_images: int, seconds: float) -> dict[str, Any]:
    """Return the speed and the environment of the evaluation for the results."""
    return {
        "images_per_second": round(num_images / seconds, 1),
        "seconds": round(seconds, 2),
        "device": device_name(accelerator),
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        "versions": get_versions(),
    }


# The model -----------------------------------------------------------------------------------------------------------


def load_classifier(source: str, folder: str) -> Classifier:
    """Load a saved classifier of any kind.

    Args:
        source: name of the model as the user wrote it, for error messages.
        folder: folder of the model.

    Raises:
        ValueError: if the model has no classifier or is not a vitcls model.
    """
    check_is_vitcls(source, folder)
    config = ViTCLSConfig.from_pretrained(folder)
    classes = {model_class.__name__: model_class for model_class in CLASSES.values()}
    saved = (config.architectures or ["model of no known class"])[0]
    if saved not in classes or not (config.tasks or config.num_labels):
        raise ValueError(f"{source} holds a {saved} without a classifier: fine-tune it first (scripts/finetune.py)")
    if config.problem_type == "regression":
        raise ValueError(f"{source} was trained for regression, and only classifiers are evaluated here")
    return classes[saved].from_pretrained(folder)


# Labels --------------------------------------------------------------------------------------------------------------


def relabelled(pictures: LabelledPictures, given: LabelSpace, known: LabelSpace) -> LabelledPictures:
    """Return the images with label indices of the model instead of the dataset, matched by name.

    Args:
        pictures: the images and labels of the dataset.
        given: label space of the dataset.
        known: label space of the model, which may have more labels than the dataset.

    Raises:
        ValueError: if the kinds of labels or the tasks differ, or the model does not have a label that is used.
    """
    if given.kind != known.kind:
        raise ValueError(
            f"the data set has {DESCRIPTIONS[given.kind]} and the model {DESCRIPTIONS[known.kind]}: choose its "
            "columns with --label-column, and --label-separator for several labels in one"
        )
    if given.kind == "multi_task" and given.columns.keys() != known.columns.keys():
        raise ValueError(
            f"the data set has the tasks {', '.join(given.columns)} and the model {', '.join(known.columns)}: choose "
            "the columns with --label-column"
        )
    return LabelledPictures(pictures.pictures, RELABEL[known.kind](pictures.labels, given, known))


DESCRIPTIONS: dict[LabelKind, str] = {
    "single_label_classification": "one label per image",
    "multi_label_classification": "any number of labels per image",
    "multi_task": "several tasks with one label each",
}


def relabelled_single(labels: Iterable[int], given: LabelSpace, known: LabelSpace) -> list[int]:
    """Return class indices of the model."""
    index = Matching(given.names, known.names)
    return [index[label] for label in labels]


def relabelled_multi(labels: Iterable[list[float]], given: LabelSpace, known: LabelSpace) -> list[list[float]]:
    """Return 0.0 or 1.0 per class of the model; 0.0 for classes that the dataset does not have."""
    index = Matching(given.names, known.names)
    matched = []
    for row in labels:
        present = {index[place] for place, value in enumerate(row) if value}
        matched.append([float(place in present) for place in range(len(known.names))])
    return matched


def relabelled_tasks(labels: Iterable[dict[str, int]], given: LabelSpace, known: LabelSpace) -> list[dict[str, int]]:
    """Return class indices of the model by task. Missing labels (-100) are unchanged."""
    matching = {task: Matching(given.columns[task], names) for task, names in known.columns.items()}
    return [
        {task: IGNORED_LABEL if row[task] == IGNORED_LABEL else index[row[task]] for task, index in matching.items()}
        for row in labels
    ]


RELABEL: dict[LabelKind, Callable[[Any, LabelSpace, LabelSpace], list[Any]]] = {
    "single_label_classification": relabelled_single,
    "multi_label_classification": relabelled_multi,
    "multi_task": relabelled_tasks,
}


class Matching:
    """Map the index of a label in the dataset to the index of the label with the same name in the model."""

    def __init__(self, given: list[str], known: list[str]) -> None:
        self.given = given
        self.known = known
        indices = {name: index for index, name in enumerate(known)}
        self.matched = [indices.get(name) for name in given]

    def __getitem__(self, label: int) -> int:
        matched = self.matched[label]
        if matched is None:
            raise ValueError(
                f"the data set has the label {self.given[label]!r} and the model does not: it knows "
                f"{', '.join(self.known[:20])}{', ...' if len(self.known) > 20 else ''}"
            )
        return matched


# Output --------------------------------------------------------------------------------------------------------------


def progress(console: Console, accelerator: Accelerator) -> Callable[[KeptBatches], Iterable[HeldOutBatch]]:
    """Return a function that shows progress on the main process: a bar on a terminal, otherwise lines."""
    if not accelerator.is_main_process:
        return iter
    if console.is_terminal:
        return lambda batches: track(batches, "evaluating", console=console, transient=True)
    return lambda batches: told(batches, console)


def told(batches: KeptBatches, console: Console) -> Iterator[HeldOutBatch]:
    """Yield the batches, and print a progress line every few seconds."""
    last = time.monotonic()
    for number, batch in enumerate(batches):
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"evaluating: batch {number}/{len(batches)}")
        yield batch


def show(results: dict[str, Any], config: ViTCLSConfig, console: Console) -> None:
    """Print the metrics, and the metrics of each class if there are few classes."""
    split = ": ".join(filter(None, [results["split"], results["held_out_part"]]))
    counted = f"{results['num_images']:,} images of {results['dataset']} ({split}), each counted once"
    console.print(f"{counted}; {results['images_per_second']:,} images/s", markup=False)
    console.print(table("", ["Metric", "Value"], build_metric_rows(results, config)))
    for title, rows in build_class_tables(results, config).items():
        console.print(table(title, list(rows[0]), [list(row.values()) for row in rows]))


def table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    """Build a table whose first column is left-aligned and whose other columns, numbers, are right-aligned."""
    printed = Table(title=title or None, title_justify="left")
    for place, name in enumerate(header):
        printed.add_column(name, justify="right" if place else "left")
    for row in rows:
        printed.add_row(*map(escape, row))
    return printed
