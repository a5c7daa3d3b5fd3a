"""What a run leaves: results.json, and its last lines."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from ..data.in_memory import MEMORY_PREFIX
from ..data.splits import MAX_CLASS_RATIO, TrainingData, describe_data
from ..hub.local_paths import is_local, make_relative, split_prefix
from ..hub.model_files import PREDICTIONS_FILE, RESULTS_FILE, SPLITS_FILE
from ..inference.evaluator import Predictions
from ..inference.intervals import MIN_CORRECTED_IMAGES
from ..runtime.flags import get_flag_fields, to_arguments, to_flags
from ..runtime.system import get_versions
from .defaults import FINE_TUNING_EPOCHS
from .duration import format_minutes
from .options import TrainOptions
from .plan import STEP_FLAGS, RunPlan
from .reporter import Reporter, format_metric
from .run_folder import CHECKPOINTS_FOLDER
from .run_inputs import RunInputs
from .summary import count_parameters, count_tokens


# Flags that the command for the other kind of run leaves out; --hub-model-id, because its model would
# replace that of this run
FLAGS_OF_KINDS = {
    *STEP_FLAGS,
    *("trainable", "distillation", "num_distillation_tokens"),
    *("resume", "overwrite", "hub_model_id"),
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
        lines: to print about the frozen model and the calibration.
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
    lines: dict[str, str | None] = field(default_factory=dict)


def build_results(
    inputs: RunInputs, data: TrainingData, outcome: Outcome, chosen_flags: dict[str, Any]
) -> dict[str, Any]:
    """Build the content of results.json."""
    setup = inputs.setup
    state = AcceleratorState()
    return {
        "dataset": data.name,
        "split": outcome.split,
        "held_out_split": data.held_out_split,
        "num_training_images": outcome.num_training_images,
        "data": describe_data(data),
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
        "num_parameters": count_parameters(setup.model),
        "token_layout": count_tokens(setup.model.config),
        "device": inputs.device,
        "mixed_precision": state.mixed_precision,
        "num_processes": state.num_processes,
        "versions": get_versions(),
        **outcome.metrics,
        "num_unreadable_training_images": outcome.num_unreadable,
        **outcome.results,
    }


# Printed lines ------------------------------------------------------------------------------------


def print_result(
    results: dict[str, Any],
    result_metrics: tuple[str, ...],
    plan: RunPlan,
    data: TrainingData,
    asked: TrainOptions,
    reporter: Reporter,
) -> None:
    """Print the last lines of the run.

    Args:
        results: content of results.json.
        result_metrics: names of the metrics of the result.
        plan, data: of the run.
        asked: the options as the person set them.
        reporter: prints the lines.
    """
    if num_unreadable := results["num_unreadable_training_images"]:
        reporter.warn(
            f"{num_unreadable} training image(s) could not be read and were replaced with other "
            "images"
        )
    class_text = steps_text = None
    if data.class_ratio > MAX_CLASS_RATIO and results.get("per_class"):
        worst = min(
            (row for row in results["per_class"] if row["images"]), key=lambda row: row["recall"]
        )
        # The metrics that large classes do not dominate
        class_text = (
            f"of different sizes: balanced accuracy {results['balanced_accuracy']:.1%}, macro F1 "
            f"{results['macro_f1']:.1%}, lowest recall {worst['recall']:.1%} ({worst['name']})"
        )
    if plan.kind == "frozen":
        seconds = plan.fine_tuning_seconds
        duration = "" if seconds is None else f", about {format_minutes(seconds)}"
        steps_text = (
            f"not fine-tuned: the encoder is frozen. Five epochs of all layers{duration}, gained "
            f"1.3 points on average of 15 runs: {build_command(asked, 'fine-tuned', epochs=int(FINE_TUNING_EPOCHS))}"
        )
    reporter.print_lines(
        {
            "result": describe_result(results, result_metrics) + describe_worse_end(results, asked),
            "classes": class_text,
            "features": results.get("features", {}).get("summary"),
            "steps": steps_text,
            "saved": describe_saved_files(asked.output_dir),
        }
    )


def describe_result(results: dict[str, Any], result_metrics: tuple[str, ...]) -> str:
    """Describe the result: measured on held-out images, or estimated by cross-validation."""
    if results["split"] != "cross-validation":
        return format_result(results, result_metrics)
    record = results["frozen"]
    text = f"{format_accuracy(results)} in cross-validation"
    if results["num_images"] >= MIN_CORRECTED_IMAGES:
        text = (
            f"{format_accuracy(results)}, estimated by {record['num_folds']}-fold cross-validation "
            f"on {results['num_images']:,} images, corrected for the choice among "
            f"{len(record['candidates'])} candidates"
        )
    return f"{text}. The saved model was fitted to all of them"


def describe_worse_end(results: dict[str, Any], asked: TrainOptions) -> str:
    """Say how to keep the frozen model, if the steps made it worse; "" otherwise."""
    start = results.get("frozen", {}).get("held_out_accuracy")
    if start is None or results["accuracy"] >= start:
        return ""
    return (
        f". The frozen start was better, {start:.2%}: "
        f"{build_command(asked, 'frozen', trainable='head')}"
    )


def format_result(metrics: dict[str, Any], names: tuple[str, ...]) -> str:
    """Format the metrics `names` of the final evaluation as one line of text."""
    names = tuple(name for name in names if name in metrics)
    if not names:
        return (
            "not evaluated, because no image was held out. Set `held_out_fraction`, such as 0.2 (with "
            "few images per class, the default is 0)"
        )
    texts = [format_metric(name, metrics[name]) for name in names]
    ending = "_accuracy_interval"
    tasks = [key.removesuffix(ending) for key in metrics if key.endswith(ending) and metrics[key]]
    if "accuracy_interval" in metrics or "num_images_of_encoder" in metrics:
        texts = [format_accuracy(metrics), *texts[1:]]
    elif tasks:
        # Each one, with the images that have its label: their mean says little, and has no interval.
        keys = ("accuracy", "num_images", "accuracy_interval")
        records = ({key: metrics[f"{task}_{key}"] for key in keys} for task in tasks)
        results = (format_result(record, keys[:1]) for record in records)
        return ", ".join(map("{} {}".format, tasks, results))
    return f"{', '.join(texts)} on {metrics['num_images']:,} held-out images"


def format_accuracy(metrics: dict[str, Any]) -> str:
    """Format an accuracy with its interval; with few images, as a fraction without a percentage."""
    num_images = metrics["num_images"]
    text = f"accuracy {metrics['accuracy']:.2%}"
    if num_images < MIN_CORRECTED_IMAGES:
        text = f"{round(metrics['accuracy'] * num_images)} of {num_images} right"
    # The encoder was trained on the images, so the error is larger than any interval says.
    if "accuracy_interval" not in metrics:
        return f"{text} (no interval)"
    low, high = (100 * value for value in metrics["accuracy_interval"])
    if num_images < MIN_CORRECTED_IMAGES:
        return f"{text} (95%: {low:.0f} to {high:.0f}%)"
    return f"{text} (95% interval: {low:.1f} to {high:.1f})"


def build_command(asked: TrainOptions, suffix: str, **changes: Any) -> str:
    """Build the command of a run of the other kind: with steps instead of frozen, or the reverse.

    Its folder has a suffix: the model of this run stays, and the two can be compared. `asked` are
    the options as the person set them. No command can read data in memory.
    """
    if str(asked.dataset).startswith(MEMORY_PREFIX):
        texts = [f"{name}={value!r}" for name, value in changes.items()]
        return f"finetune(..., {', '.join(texts)})"
    names = {
        name
        for name, field in get_flag_fields(type(asked)).items()
        if getattr(asked, name) != field.default
    }
    flags = {
        name: shorten_path(value)
        for name, value in to_flags(asked).items()
        if name in names - FLAGS_OF_KINDS
    }
    flags |= {"output_dir": f"{flags['output_dir']}-{suffix}"} | changes
    arguments = [argument for flag in flags.items() for argument in to_arguments(*flag)]
    return f"vitcls finetune {shlex.join(arguments)}"


def shorten_path(name: Any) -> Any:
    """Make a local path in the working directory relative to it."""
    relative = make_relative(name)
    is_far = is_local(name) and split_prefix(relative)[1].startswith("../")
    return name if is_far else relative


def describe_saved_files(folder: Path) -> str:
    """List what a run has saved, with sizes, because checkpoints may be larger than the model."""
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
    """Add up the sizes of the files in a folder."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e6:,.1f} MB"
