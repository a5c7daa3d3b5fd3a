"""Evaluation of a saved model, from options to printed and written results.

options -> model, data -> labels matched by name -> Evaluator (evaluator.py) -> tables, and a JSON file

Images that the model was trained on are not evaluated unless --split is set
(data/splits_table.py).
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..conversion.open_model import open_model
from ..data.cells import normalize_name
from ..data.evaluation_data import (
    EvaluationData,
    Trained,
    load_evaluation_data,
    load_photographs,
)
from ..data.images import LabeledImages
from ..data.labels import (
    UNLABELED,
    LabelSpace,
    OneLabel,
    SeveralLabels,
    check_is_classifier,
    check_threshold,
    get_label_space,
)
from ..data.options import DataOptions
from ..data.sources import load_on_main
from ..data.splits_table import read_splits, select_task
from ..frozen.scenes import TrainedScenes, read_scenes
from ..hub.model_files import ADDITIONS_KEY
from ..hub.model_folder import ModelFolder
from ..inference.features import FeatureLayout, Features, FrozenEncoder
from ..inference.intervals import estimate_average_precision
from ..inference.load_model import load_for_inference
from ..inference.metrics import drop_intervals
from ..inference.options import EvaluateOptions
from ..inference.prediction_rows import DEFAULT_THRESHOLD
from ..inference.single_task import build_task_config
from ..inference.stated_result import build_class_tables, build_metric_table, format_name
from ..model.image_processing_vitcls import shorten_text
from ..runtime.distributed import build_accelerator, set_mixed_precision
from ..runtime.errors import format_name_list, warn_on_first_process
from ..runtime.files import escape_csv_cell, write_json
from ..runtime.progress import build_console, print_warning
from ..runtime.system import describe_device, get_versions
from .evaluator import (
    Predictions,
    build_predictions,
    build_rows,
    count_in_trained_scenes,
    describe_in_trained_scenes,
    select_logits,
    write_rows,
)


EVALUATION_BATCH_SIZE = 64  # Default number of images per process and forward pass on GPUs


def evaluate_checkpoint(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate a saved model, print and return the results, and write them to `output` if set.

    Args:
        options: The flags of `vitcls evaluate`.

    Raises:
        ValueError: if the model type is not supported, if the split does not exist, if training
            used all of its images, if an image has a label that the model lacks, or if too many
            images are unreadable.
        OSError: if the checkpoint cannot be found or read, if the dataset cannot be found, or if
            the output cannot be written.
    """
    accelerator, console, warn = set_up_evaluation(options.mixed_precision)
    with accelerator.main_process_first():  # The main process downloads the files
        folder = open_model(options.model)
    set_mixed_precision(accelerator, options.mixed_precision, folder.config)
    loaded = load_for_inference(
        folder,
        accelerator.device,
        use_head=True,
        resize=options.resize,
        batch_size=options.batch_size,
        max_batch_size=EVALUATION_BATCH_SIZE,
    )
    model = loaded.model
    config = model.config
    if options.task is not None:
        config = build_task_config(config, options.task)
    check_can_evaluate(options, config)
    label_space = get_label_space(config)

    data = load_data(options, label_space, folder, options.split, options.task, options.max_images)
    trained_scenes = read_scenes(folder).get(options.task or "")
    layout = FeatureLayout(1, {}) if trained_scenes is None else trained_scenes.layout
    encoder = FrozenEncoder(
        model,
        layout.num_layers,
        processor=loaded.processor,
        label_space=label_space,
        batch_size=loaded.batch_size,
        accelerator=accelerator,
        num_workers=options.num_workers,
        num_channels=config.num_channels,
        warn=warn,
    )

    def select(outputs: Any) -> Tensor:
        if options.task is None:
            return select_logits(label_space, outputs)
        return outputs.task_logits[options.task]  # type: ignore[no-any-return]

    start_time = time.perf_counter()
    features = encoder.compute_features(data.images, layout, select, console=console)
    threshold = DEFAULT_THRESHOLD if options.threshold is None else options.threshold
    predictions = build_predictions_by_scene(label_space, features, threshold, trained_scenes)
    seconds = time.perf_counter() - start_time
    if data.outside and config.distance_threshold is not None and model.distance_layers:
        found = measure_outside(encoder, data.outside, layout, config.distance_threshold)
        predictions.metrics["outside"] = found
    if options.split and data.num_trained:
        drop_intervals(predictions.metrics)
    if options.answers:
        counted = {"num_uncounted": data.num_uncounted, "no_estimate": data.no_estimate}
        predictions.metrics.update(counted)

    results: dict[str, Any] = {
        "model": options.model,
        "task": options.task,
        "threshold": options.threshold,
        "dataset": data.dataset,
        "split": data.split,
        "num_left_out_images": 0 if options.split else data.num_trained,
        "images_per_second": round(predictions.metrics["num_images"] / seconds, 1),
        "seconds": round(seconds, 2),
        "device": describe_device(),
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        "versions": get_versions(),
        "weights_sha256": folder.weights_sha256,
        **predictions.metrics,
    }
    if accelerator.is_main_process:
        # First the files: `| head` ends the process when it has enough lines
        write_files(options, predictions, results, console)
    print_results(results, data.description, console)
    accelerator.end_training()
    return results


def check_can_evaluate(options: EvaluateOptions, config: Any) -> None:
    """Raise ValueError if the model is no classifier, or flags are for another kind of labels."""
    check_is_classifier(config)
    check_threshold(options.threshold, config)
    if options.per_image is not None and config.tasks:
        raise ValueError(
            "`per_image` requires a model of one task. Use `vitcls predict --dataset` for several tasks"
        )


def build_predictions_by_scene(
    label_space: LabelSpace,
    features: Features,
    threshold: float,
    trained_scenes: TrainedScenes | None,
) -> Predictions:
    """Measure the logits; photos of one scene count once, and those of trained scenes are counted apart."""
    outputs = features
    if trained_scenes is not None:  # Each shot of a scene is little further evidence
        outputs = replace(features, groups=trained_scenes.join_shots(features))
    predictions = build_predictions(label_space, outputs, threshold)
    if isinstance(label_space, SeveralLabels):
        add_average_precision_interval(predictions)
    if trained_scenes is not None:
        near = trained_scenes.recognize(features)
        predictions.metrics["in_trained_scenes"] = count_in_trained_scenes(near, predictions)
    return predictions


def add_average_precision_interval(predictions: Predictions) -> None:
    """Add the interval of the mean average precision, as a run states it, if any image has a label."""
    if predictions.metrics["mean_average_precision"] is None:
        return
    outputs = predictions.outputs
    estimate = estimate_average_precision(outputs.logits, outputs.labels > 0.5, outputs.groups)
    predictions.metrics.update(estimate)


def measure_outside(
    encoder: FrozenEncoder, images: LabeledImages, layout: FeatureLayout, threshold: float
) -> dict[str, int]:
    """Count the photos that show none of the classes, and those of them that are `unknown`."""
    distances = encoder.compute_features(
        images, layout, lambda outputs: outputs.distance[:, None]
    ).logits
    return {"num_images": len(distances), "num_unknown": int((distances > threshold).sum())}


def write_files(
    options: EvaluateOptions, predictions: Predictions, results: dict[str, Any], console: Console
) -> None:
    """Write the rows of images and the results, if they are asked for."""
    if options.per_image is not None:
        write_rows(options.per_image, build_rows(predictions), results["weights_sha256"])
        console.print(f"saved {options.per_image}", markup=False)
    if options.output is not None:
        write_json(options.output, results)
        console.print(f"saved {options.output}", markup=False)


def set_up_evaluation(
    mixed_precision: str,
) -> tuple[Accelerator, Console, Callable[[str], None]]:
    """Build the accelerator, the console of the main process, and a function that warns."""
    accelerator = build_accelerator(mixed_precision=mixed_precision)
    console = build_console(quiet=not accelerator.is_main_process)
    return accelerator, console, partial(print_warning, console)


def load_data(
    options: DataOptions,
    label_space: LabelSpace,
    folder: ModelFolder,
    split: str | None,
    task: str | None = None,
    max_images: int | None = None,
) -> EvaluationData:
    """Load the images to evaluate, without those that trained the model, with label indices of it.

    With the label space UNLABELED, every label is missing.
    """
    if label_space == UNLABELED:
        return load_on_main(options.dataset, partial(load_photographs, options, split, max_images))
    columns = {}
    if options.label_column is None and options.label_separator is None:
        # A table may have several columns that look like labels. The model's record names the right
        # one.
        columns = get_training_columns(label_space, folder, task)
    classes = label_space.names if isinstance(label_space, OneLabel) else ()
    trained = Trained(select_task(read_splits(folder), task), columns, classes)
    load = partial(load_evaluation_data, options, split, trained, max_images)
    data = load_on_main(options.dataset, load)
    images = translate_labels(data.images, data.label_space, label_space)
    return replace(data, images=images, label_space=label_space)


def get_training_columns(
    label_space: LabelSpace, folder: ModelFolder, task: str | None
) -> dict[str, Any]:
    """Find the label columns of the model's training, as values of `DataOptions`.

    These are the columns of a multi-task model, or else those in the record of the run or of the
    added task. They are empty without a record.
    """
    if label_space.kind == "multi_task":
        return {"label_column": tuple(label_space.columns)}
    results = folder.results_of_any_weights
    if task is not None:
        results = results.get(ADDITIONS_KEY, {}).get(task, {})
    if not results.get("label_column"):
        return {}
    return {name: results.get(name) for name in ("label_column", "label_separator")}


# Output -------------------------------------------------------------------------------------------


def print_results(results: dict[str, Any], part_text: str, console: Console) -> None:
    """Print the metrics, and a row per class."""
    console.print(
        f"{results['num_images']:,} images of {results['dataset']} ({part_text}), "
        f"{results['images_per_second']:,} images/s",
        markup=False,
    )
    tables = build_metric_table(results, format_name) | build_class_tables(results, format_name)
    for title, rows in tables.items():
        table = Table(title=title, title_justify="left")
        for name in rows[0]:
            # The columns of classes after the first one contain numbers
            is_number = title != "Metrics" and name != "Class"
            table.add_column(name, justify="right" if is_number else "left")
        for row in rows:
            table.add_row(*map(escape, row.values()))
        console.print(table)
    if text := describe_in_trained_scenes(results.get("in_trained_scenes", {})):
        console.print(text, style="bold yellow", markup=False)
    if outside := results.get("outside"):
        console.print(
            f"{outside['num_unknown']:,} of {outside['num_images']:,} photos that show none of the classes "
            "are `unknown`, without those that were asked about because they are"
        )


# Labels of a dataset as labels of a model ---------------------------------------------------------

# The indices are matched by the names of the labels, in the Unicode form NFC.


PLACEHOLDER = re.compile(r"LABEL_\d+$")  # Transformers' names of labels without names


def translate_labels(images: Any, data_space: LabelSpace, model_space: LabelSpace) -> Any:
    """Convert the label indices of the dataset to the label indices of the model.

    Missing labels stay missing. Raise ValueError if the kinds of labels or the tasks
    differ, if the model has several labels with the same name, or if an image has a label that the
    model lacks.
    """
    if data_space.kind != model_space.kind:
        raise ValueError(
            f"the model was trained for {model_space.kind}, but the labels are for {data_space.kind}. Select other "
            "columns with `label_column` (one for each task, empty without labels); set or remove `label_separator`"
        )
    if data_space.tasks.keys() != model_space.tasks.keys():
        raise ValueError(
            f"the model has the tasks {', '.join(model_space.tasks)}, but the dataset {', '.join(data_space.tasks)}. "
            "Add a column for each task, empty without labels, and select them with `label_column`"
        )
    matches = {
        task: match_names(own.names, model_space.tasks[task].names)
        for task, own in data_space.tasks.items()
    }
    if data_space.kind == "multi_task":
        labels = [
            {task: matches[task](each) for task, each in label.items()} for label in images.labels
        ]
    else:
        labels = list(map(matches[""], images.labels))
    if data_space.kind == "multi_label_classification":
        seen = set(map(normalize_name, data_space.names))
        if unseen := [name for name in model_space.names if normalize_name(name) not in seen]:
            warn_on_first_process(
                f"no image has the labels {format_name_list(unseen)}: they count as absent"
            )
    return replace(images, labels=labels)


def match_names(names: Sequence[str], model_names: Sequence[str]) -> Callable[[Any], Any]:
    """Build the function that translates a class index, a list of them, or None, a missing label.

    It raises ValueError if the model has no class of this name, or several.
    """
    indices: dict[str, list[int]] = {}  # Name -> its indices in the model
    for index, name in enumerate(model_names):
        indices.setdefault(escape_csv_cell(normalize_name(name)), []).append(index)

    def translate(label: Any) -> Any:
        if isinstance(label, list):
            return sorted(map(translate, label))
        if label is None:
            return None
        name = names[label]
        # The tables of `predict` have control characters of names as escape sequences.
        found = indices.get(escape_csv_cell(normalize_name(name)), [])
        if len(found) > 1:
            raise ValueError(
                f"the model has several labels with the name {shorten_text(name)}. Give these labels different "
                "names in the model's config.json"
            )
        if not found and all(map(PLACEHOLDER.match, model_names)):
            example = ", ".join(f'"{index}": "{each}"' for index, each in enumerate(names))
            raise ValueError(
                f"the labels of the model have no names ({len(model_names)} labels, LABEL_0 "
                f"...), but the dataset has {shorten_text(name)}. Set `id2label` in the model's config.json, in "
                f'the order of its training: "id2label": {{{example}}}'
            )
        if not found:
            raise ValueError(
                f"the dataset has the label {shorten_text(name)}, but the model or task has only the labels "
                f"{format_name_list(model_names, 20)}. Remove the images with this label, add the class with "
                "`vitcls add-class` (not to a task), or, if they are the same, correct the name in the model's "
                "config.json"
            )
        return found[0]

    return translate
