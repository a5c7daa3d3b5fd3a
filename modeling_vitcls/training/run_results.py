"""The beginning and the end of a run on paper: checkpoint metadata, results.json, printed lines."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from ..data.splits import MAX_CLASS_RATIO, TrainingData, describe_data
from ..hub.local_paths import is_local, make_relative, split_prefix
from ..hub.model_files import PREDICTIONS_FILE, RESULTS_FILE, SPLITS_FILE
from ..inference.evaluator import Predictions
from ..inference.intervals import MIN_CORRECTED_IMAGES
from ..runtime.flags import get_flag_fields, to_arguments, to_flags
from .defaults import FINE_TUNING_EPOCHS
from .duration import format_minutes
from .options import TrainOptions
from .output_folder import CHECKPOINTS_FOLDER
from .plan import STEP_FLAGS, RunPlan
from .reporter import (
    build_model_record,
    describe_model,
    describe_splits,
    format_accuracy,
    format_result,
)
from .resume import build_flags_record, check_run_unchanged
from .run_inputs import Launch, RunInputs


# flags of a frozen run that its command for steps leaves out; --hub-model-id, because its model would
# replace the frozen one
FLAGS_WITHOUT_FINE_TUNING = {*STEP_FLAGS, "trainable", "resume", "overwrite", "hub_model_id"}


TEXTS_OF_KINDS = {
    "frozen": "frozen encoder, no steps",
    "steps": "steps, measured on held-out images",
}


@dataclass(frozen=True)
class Outcome:
    """What a run has made: the metrics of the saved model, and how it came about.

    Attributes:
        metrics, calibration: fields of results.json.
        split: the images of the metrics, as text.
        num_training_images: number of images that the model was fitted to.
        predictions: content of predictions.parquet, if the images have one label each.
        nearest_images: names of the nearest training images of each wrong prediction, by its index.
        seconds: duration of the fit or of the steps.
        num_steps, epochs, images_per_step: 0 without steps.
        num_unreadable: number of training images that were replaced with others.
        results: further fields of results.json.
    """

    metrics: dict[str, Any]
    split: str
    num_training_images: int
    calibration: dict[str, Any] | None
    predictions: Predictions | None
    nearest_images: dict[int, list[str]] | None
    seconds: float
    num_steps: int = 0
    epochs: float = 0.0
    images_per_step: int = 0
    num_unreadable: int = 0
    results: dict[str, Any] = field(default_factory=dict)


def build_run_record(
    plan: RunPlan, data: TrainingData, inputs: RunInputs, launch: Launch
) -> dict[str, Any]:
    """Build what checkpoints contain about the run, and compare it with the checkpoint to resume.

    Raise ValueError if the checkpoint belongs to a different run.
    """
    options = plan.options
    checkpoint = launch.checkpoint
    state = AcceleratorState()
    assert options.batch_size is not None, "the defaults set it"
    recorded = None if checkpoint is None else checkpoint.metadata["flags"]
    config = inputs.setup.model.config.to_dict()
    record = {
        "images_per_step": options.batch_size
        * options.gradient_accumulation_steps
        * state.num_processes,
        "mixed_precision": state.mixed_precision,
        "data": describe_data(data),
        "flags": build_flags_record(to_flags(launch.asked), to_flags(options), config, recorded),
    }
    if checkpoint is not None:
        check_run_unchanged(checkpoint.metadata, record, options.output_dir)
    return record


def build_results(
    inputs: RunInputs,
    data: TrainingData,
    outcome: Outcome,
    chosen_flags: dict[str, Any],
) -> dict[str, Any]:
    """Build the content of results.json."""
    setup = inputs.setup
    return {
        "dataset": data.name,
        "split": outcome.split,
        "held_out_split": data.held_out_split,
        "num_training_images": outcome.num_training_images,
        "chosen_flags": chosen_flags,
        **setup.results,
        "calibration": outcome.calibration,
        "selection_metric": setup.selection_metric,
        "forward_flops_per_image": inputs.forward_flops,
        "steps": outcome.num_steps,
        "epochs": round(outcome.epochs, 4),
        "seconds": round(outcome.seconds, 2),
        "images_per_second": round(
            # a frozen run of a few photos may round to no time, and has no steps
            outcome.num_steps * outcome.images_per_step / (outcome.seconds or 1),
            1,
        ),
        **build_model_record(setup.model),
        **outcome.metrics,
        "num_unreadable_training_images": outcome.num_unreadable,
        **outcome.results,
    }


def print_summary(inputs: RunInputs, plan: RunPlan, data: TrainingData, launch: Launch) -> None:
    """Print what the run does, before it starts."""
    setup, reporter = inputs.setup, launch.reporter
    is_choice_known = setup.probe is None  # a frozen model chooses geometry and tokens
    reporter.print_lines(
        {
            **describe_splits(
                data,
                setup.processor,
                setup.labels_text,
                is_resize_known=is_choice_known,
                needs_selection=plan.options.select == "best",
            ),
            **inputs.images.facts,
            **describe_model(
                inputs.initial.name, setup.model, inputs.forward_flops, is_choice_known
            ),
            **inputs.lines,
            **plan.lines,
            "run": f"{TEXTS_OF_KINDS[plan.kind]}: {plan.reason}",
        }
    )
    for warning in setup.list_warnings(data):
        reporter.warn(warning)
    reporter.printed_metrics = setup.printed_metrics


def print_result(
    results: dict[str, Any], inputs: RunInputs, plan: RunPlan, data: TrainingData, launch: Launch
) -> None:
    """Print the last lines of the run."""
    reporter = launch.reporter
    if num_unreadable := results["num_unreadable_training_images"]:
        reporter.warn(
            f"{num_unreadable} training image(s) could not be read and were replaced with other "
            "images"
        )
    reporter.print_line("result", describe_result(results, inputs.setup.result_metrics))
    if data.class_ratio > MAX_CLASS_RATIO and results.get("per_class"):
        reporter.print_line("classes", describe_class_results(results))
    if "features" in results:
        reporter.print_line("features", results["features"]["summary"])
    if plan.kind == "frozen":
        seconds = plan.fine_tuning_seconds
        duration = "" if seconds is None else f", about {format_minutes(seconds)}"
        reporter.print_line(
            "steps",
            f"not fine-tuned: the encoder is frozen. Five epochs of all layers{duration}, gained "
            f"1.3 points on average of 15 runs: {build_fine_tuning_command(launch.asked)}",
        )
    reporter.print_line("saved", describe_saved_files(plan.options.output_dir))


def describe_result(results: dict[str, Any], result_metrics: tuple[str, ...]) -> str:
    """Return the result as text: measured on held-out images, or estimated by cross-validation."""
    if results["split"] != "cross-validation":
        return format_result(results, result_metrics)
    record = results["frozen"]
    text = f"{format_accuracy(results)}, out of fold"
    if results["num_images"] >= MIN_CORRECTED_IMAGES:
        text = (
            f"{format_accuracy(results)}, estimated by {record['num_folds']}-fold cross-validation "
            f"on {results['num_images']:,} images, corrected for the choice among "
            f"{len(record['candidates'])} candidates"
        )
    return f"{text}. The saved model was fitted to all of them"


def build_fine_tuning_command(asked: TrainOptions) -> str:
    """Build the command of a frozen run, changed so that it trains all layers.

    `asked` are the options as the person set them.
    """
    names = {
        name
        for name, field in get_flag_fields(type(asked)).items()
        if getattr(asked, name) != field.default
    }
    flags = {
        name: shorten_path(value)
        for name, value in to_flags(asked).items()
        if name in names - FLAGS_WITHOUT_FINE_TUNING
    }
    # A folder of its own: the frozen model stays, and the two can be compared.
    flags |= {
        "output_dir": f"{flags['output_dir']}-fine-tuned",
        "epochs": f"{FINE_TUNING_EPOCHS:g}",
    }
    arguments = [argument for flag in flags.items() for argument in to_arguments(*flag)]
    return f"vitcls finetune {shlex.join(arguments)}"


def shorten_path(name: Any) -> Any:
    """Make a local path relative to the working directory, unless two folders lie between them."""
    relative = make_relative(name)
    is_far = is_local(name) and split_prefix(relative)[1].startswith("../../")
    return name if is_far else relative


def describe_class_results(results: dict[str, Any]) -> str:
    """Return the metrics that large classes do not dominate."""
    worst = min(
        (row for row in results["per_class"] if row["images"]), key=lambda row: row["recall"]
    )
    return (
        f"of different sizes: balanced accuracy {results['balanced_accuracy']:.1%}, macro F1 "
        f"{results['macro_f1']:.1%}, lowest recall {worst['recall']:.1%} ({worst['name']})"
    )


def describe_saved_files(folder: Path) -> str:
    """Return what a run has saved, with sizes, because checkpoints may be larger than the model."""
    files = [
        name for name in (RESULTS_FILE, SPLITS_FILE, PREDICTIONS_FILE) if (folder / name).exists()
    ]
    names = ", ".join(["model", "image processor", *files])
    text = f"{folder} ({names}), {measure_size(folder)}"
    checkpoints = folder / CHECKPOINTS_FOLDER
    if checkpoints.exists():
        text += f", of which {measure_size(checkpoints)} are checkpoints"
    return text


def measure_size(folder: Path) -> str:
    """Return the size of the files in a folder."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e6:,.1f} MB"
