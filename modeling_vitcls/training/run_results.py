"""What a run leaves: results.json, and its last lines."""

import shlex
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from ..data.in_memory import MEMORY_PREFIX
from ..data.splits import MAX_CLASS_RATIO, TrainingData, describe_data
from ..hub.local_paths import is_local, make_relative, split_prefix
from ..hub.model_files import PREDICTIONS_FILE, RESULTS_FILE, SPLITS_FILE
from ..runtime.flags import get_flag_fields, to_arguments, to_flags
from ..runtime.system import get_versions
from .defaults import FINE_TUNING_EPOCHS
from .duration import format_minutes
from .options import TrainOptions
from .outcome import Outcome
from .plan import STEP_FLAGS, RunPlan
from .reporter import Reporter
from .run_folder import CHECKPOINTS_FOLDER
from .run_inputs import RunInputs
from .summary import count_parameters, count_tokens


# Images of each class in the study of fine-tuning, which had one label per image
MIN_STUDY_CLASS_SIZE = 20
# Flags that the command for the other kind of run leaves out
FLAGS_OF_KINDS = {
    *STEP_FLAGS,
    "trainable",
    "distillation",
    "num_distillation_tokens",
    "resume",
    "overwrite",
    "hub_model_id",  # The other model would replace that of this run
}


def build_results(
    inputs: RunInputs, data: TrainingData, outcome: Outcome, chosen_flags: dict[str, Any]
) -> dict[str, Any]:
    """Build the content of results.json."""
    setup = inputs.setup
    state = AcceleratorState()
    results = {
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
        # These are the values of a frozen run; a run with steps replaces them.
        "steps": 0,
        "epochs": 0.0,
        "seconds": round(outcome.seconds, 2),
        "images_per_second": 0.0,
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
    num_seen = max((each.seen_by_encoder for each in outcome.measured), default=0)
    if num_seen:
        # The error is larger than any interval says.
        results = {name: results[name] for name in results if "_interval" not in name}
        results["num_images_of_encoder"] = num_seen
    return results


# Printed lines ------------------------------------------------------------------------------------


def print_result(
    outcome: Outcome, plan: RunPlan, data: TrainingData, asked: TrainOptions, reporter: Reporter
) -> None:
    """Print the last lines of the run. `asked` are the options as the person set them."""
    steps_text = None
    if plan.kind == "frozen":
        seconds = plan.fine_tuning_seconds
        duration = "" if seconds is None else f", about {format_minutes(seconds)}"
        command = build_command(asked, "fine-tuned", epochs=int(FINE_TUNING_EPOCHS))
        gain = ""
        if data.train.min_class_size >= MIN_STUDY_CLASS_SIZE:
            gain = ", gained 1.3 points on average of 15 runs"
        steps_text = (
            "not fine-tuned: the encoder is frozen. Five epochs of all layers"
            f"{duration}{gain}: {command}"
        )
    lines = {
        "result": describe_result(outcome) + describe_worse_end(outcome, asked),
        "classes": describe_classes(outcome.metrics, data.train.class_ratio),
        "features": outcome.results.get("features", {}).get("summary"),
        "steps": steps_text,
        "saved": describe_saved_files(asked.output_dir),
    }
    if outcome.num_unreadable:
        reporter.warn(
            f"{outcome.num_unreadable} training image(s) could not be read and were replaced with "
            "other images"
        )
    reporter.print_lines(lines)


def describe_result(outcome: Outcome) -> str:
    """Describe the result: measured on held-out images, or estimated by cross-validation."""
    if not outcome.measured:
        return (
            "not evaluated, because no image was held out. Set `held_out_fraction`, such as 0.2 (with "
            "few images per class, the default is 0)"
        )
    text = "\n".join(map(str, outcome.measured))
    if outcome.measured[0].num_folds:
        text += ". The saved model was fitted to all of them"
    return text


def describe_classes(metrics: dict[str, Any], class_ratio: float) -> str | None:
    """Describe the result by metrics that large classes do not dominate, if the sizes differ."""
    if class_ratio <= MAX_CLASS_RATIO or not metrics.get("per_class"):
        return None
    rows = [row for row in metrics["per_class"] if row["images"]]
    worst = min(rows, key=lambda row: row["recall"])
    return (
        f"of different sizes: balanced accuracy {metrics['balanced_accuracy']:.1%}, macro F1 "
        f"{metrics['macro_f1']:.1%}, lowest recall {worst['recall']:.1%} ({worst['name']})"
    )


def describe_worse_end(outcome: Outcome, asked: TrainOptions) -> str:
    """Say how to keep the frozen model, if the steps made it worse; "" otherwise."""
    metric = "accuracy" if "accuracy" in outcome.metrics else "mean_average_precision"
    start = outcome.results.get("frozen", {}).get(f"held_out_{metric}")
    if start is None or outcome.metrics[metric] >= start:
        return ""
    return (
        f". The frozen start was better, {start:.2%}: "
        f"{build_command(asked, 'frozen', trainable='head')}"
    )


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
    """List what a run has saved."""
    names = (RESULTS_FILE, SPLITS_FILE, PREDICTIONS_FILE, CHECKPOINTS_FOLDER)
    found = [name for name in names if (folder / name).exists()]
    return f"{folder} ({', '.join(['model', 'image processor', *found])})"
