"""What a run of either kind has made and measured (Outcome), results.json, and its last lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.state import AcceleratorState

from ..data.splits import TrainingData
from ..evaluation.evaluator import Predictions, count_in_trained_scenes, describe_in_trained_scenes
from ..frozen.scenes import TrainedScenes
from ..inference.intervals import MIN_CORRECTED_IMAGES
from ..inference.metrics import MetricValues, drop_intervals
from ..inference.stated_result import Measurement, describe_classes
from ..inference.token_names import count_tokens
from ..model.configuration_vitcls import ViTCLSConfig
from ..runtime.system import describe_device, get_versions
from .defaults import FINE_TUNING_EPOCHS
from .options import FinetuneOptions
from .plan import RunPlan
from .reporter import Reporter
from .run_inputs import RunInputs


def list_measurements(
    task_metrics: Mapping[str, MetricValues],
    metric: str,
    num_seen: int = 0,
    num_folds: int = 0,
) -> list[Measurement]:
    """List the results of all tasks that have labeled images.

    Args:
        task_metrics: metrics of each task (inference/metrics.py).
        metric: of the results.
        num_seen: number of images of `TrainingData.count_seen`. If there are any, the
            intervals are removed from the metrics.
        num_folds: number of folds of the cross-validation; 0 for held-out images.
    """
    measured = []
    for task, metrics in task_metrics.items():
        if num_seen:
            drop_intervals(metrics)
        if metrics.get(metric) is None:
            continue
        # The average precision of a handful of images means little.
        is_small = "exact_match" in metrics and metrics["num_images"] < MIN_CORRECTED_IMAGES
        own_metric = "exact_match" if is_small else metric
        measured.append(Measurement(task, own_metric, metrics, num_folds))
    return measured


@dataclass(frozen=True)
class Outcome:
    """What a run has made: the metrics of the saved model, and how it came about.

    Attributes:
        data: the images.
        measured: the result of each task; empty if no images measured the model.
        metrics, calibration: fields of results.json.
        split: the images of the metrics, as text.
        num_training_images: number of images that the model was fitted to.
        predictions: content of predictions.parquet, if the images have no several tasks.
        seconds: duration of the fit or of the steps.
        num_unreadable: number of training images that could not be read.
        trained_scenes: recognizes photos of the scenes that trained the model, if the encoder can.
        in_trained_scenes: indices of the held-out photos that do.
        results: further fields of results.json, such as the number of steps.
        lines: to print about the frozen model and the calibration.
        missing_reason: why nothing could measure the model.
    """

    data: TrainingData
    measured: list[Measurement]
    metrics: MetricValues
    split: str
    num_training_images: int
    calibration: dict[str, Any] | None
    predictions: Predictions | None
    seconds: float
    num_unreadable: int
    trained_scenes: TrainedScenes | None
    in_trained_scenes: Sequence[int]
    results: dict[str, Any]
    lines: dict[str, str | None]
    missing_reason: str = (
        "no image was held out. Set `held_out_fraction`, such as 0.2 (with few images per class, the "
        "default is 0)"
    )


def build_results(inputs: RunInputs, outcome: Outcome, record: dict[str, Any]) -> dict[str, Any]:
    """Build the content of results.json.

    `record` is from `build_run_record`.
    """
    model = inputs.model
    data = outcome.data
    num_seen = data.count_seen(inputs.encoder_rows, "steps" not in outcome.results)
    asked_flags = {name: record["flags"][name] for name in record["chosen_flags"]}
    results = {
        "dataset": data.name,
        "split": outcome.split,
        "held_out_split": data.held_out_split,
        "num_training_images": outcome.num_training_images,
        # Compared when the run is resumed. The other flags are in config.resolved.yaml.
        **{name: record[name] for name in record if name != "flags"},
        "asked_flags": asked_flags,
        "label_column": list(inputs.options.label_column or data.label_space.columns),
        "label_separator": data.label_space.separator,
        "calibration": outcome.calibration,
        "selection_metric": inputs.selection_metric,
        "forward_flops_per_image": inputs.forward_flops,
        # These are the values of a frozen run; a run with steps replaces them.
        "steps": 0,
        "epochs": 0.0,
        "seconds": round(outcome.seconds, 2),
        "num_parameters": model.num_parameters(),
        "token_layout": count_tokens(model.config),
        "device": describe_device(),
        "num_processes": AcceleratorState().num_processes,
        "versions": get_versions(),
        **outcome.metrics,
        "num_unreadable_training_images": outcome.num_unreadable,
        **outcome.results,
    }
    if num_seen and outcome.measured:
        results["num_seen_images"] = num_seen
    if record := find_in_trained_scenes(outcome):
        results["in_trained_scenes"] = record
    return results


def find_in_trained_scenes(outcome: Outcome) -> dict[str, Any]:
    """Count held-out photos of scenes that trained the model, and the others that are right."""
    if not outcome.in_trained_scenes:
        return {}
    if outcome.predictions is None:  # Several tasks have no common predictions
        names = outcome.data.held_out.images.get_names()
        return {
            "names": [names[index] for index in outcome.in_trained_scenes],
            "num_images": outcome.metrics["num_images"],
        }
    return count_in_trained_scenes(outcome.in_trained_scenes, outcome.predictions)


# Printed lines ------------------------------------------------------------------------------------


def print_result(config: ViTCLSConfig, outcome: Outcome, plan: RunPlan, reporter: Reporter) -> None:
    """Print the last lines of the run, whose model has this configuration."""
    options = plan.options
    steps_text = None
    if plan.kind == "frozen" and options.trainable == "full":
        steps_text = (
            "not fine-tuned: the encoder is frozen. To train all layers, set "
            f"`epochs={FINE_TUNING_EPOCHS:g}` and another `output_dir`"
        )
    if outcome.num_unreadable:
        reporter.warn(
            f"{outcome.num_unreadable:,} of {len(outcome.data.train):,} training images could not be "
            "read, and did not train the model"
        )
    reporter.print_lines(
        {
            "result": describe_result(outcome) + describe_start(outcome, options.model),
            "scenes": describe_in_trained_scenes(find_in_trained_scenes(outcome)),
            "fade-in": describe_fade_in(outcome.results.get("fade_in")),
            "unread": describe_unread_tokens(config, options),
            "classes": describe_classes(outcome.metrics, outcome.data.train.class_ratio),
            "steps": steps_text,
            "saved": str(options.output_dir),
        }
    )


def describe_result(outcome: Outcome) -> str:
    """Describe the result: measured on held-out images, or estimated by cross-validation."""
    if not outcome.measured:
        return f"not evaluated, because {outcome.missing_reason}"
    text = "\n".join(map(str, outcome.measured))
    first = outcome.measured[0]
    if not first.num_folds:
        return text
    num_unmeasured = outcome.num_training_images - first.metrics["num_images"]
    if num_unmeasured and not first.task:
        return (
            f"{text}. The saved model was fitted to {outcome.num_training_images:,} images, of which "
            f"{num_unmeasured:,} are not counted: a model was unsure about them, or the rest would lack their label"
        )
    return f"{text}. The saved model was fitted to all images"


def describe_start(outcome: Outcome, model: str) -> str:
    """Compare the result with what was there before, as far as that was measured; "" otherwise.

    The model of the run is compared as it was given, and with the classifier fitted again.
    """
    text = ""
    if "before_steps" in outcome.results:
        start, is_better = compare_start(outcome, outcome.results["before_steps"])
        text = f". Before the steps: {start}"
        if is_better:
            text += ", which was better"
            if "frozen" in outcome.results:
                text += ". To keep that, set `trainable='head'` and no flag about steps"
    if "initial_classifier" not in outcome.results:
        return text
    if outcome.results["initial_classifier"] is None:
        return (
            f"{text}. {model} itself cannot be compared: some of these images trained it. To train on all, "
            "set `held_out_fraction=0`"
        )
    start, is_better = compare_start(outcome, outcome.results["initial_classifier"])
    return f"{text}. {model} itself: {start}{', which was better' if is_better else ''}"


def compare_start(outcome: Outcome, start: dict[str, float]) -> tuple[str, bool]:
    """Spell a metric from before the steps, and tell whether it was better than the result."""
    metric, value = next(iter(start.items()))
    metrics = outcome.metrics
    before = {metric: value, "num_images": metrics["num_images"], "tasks": metrics.get("tasks")}
    is_better = value > metrics[metric]
    return Measurement("", metric, before).statement, is_better


def describe_fade_in(fade_in: dict[str, float] | None) -> str | None:
    """Say how far the tokens are that a run has not faded in completely; None without any."""
    if not fade_in:
        return None
    lowest = min(fade_in.values())
    return (
        f"new tokens act with {lowest:.2f} of the weight of ordinary ones, because the run was shorter than "
        "`token_fade_in_steps`: the result says little about them"
    )


def describe_unread_tokens(config: ViTCLSConfig, options: FinetuneOptions) -> str | None:
    """Say how many of the CLS tokens that a person asked for the classifier reads; None if all.

    The result says nothing about reading the others.
    """
    number = config.num_cls_tokens
    is_asked = "num_cls_tokens" in options.get_config_values()
    if not is_asked or config.tasks or config.pooling == "attention":
        return None
    num_read = 0
    if config.pooling in ("cls", "cls_mean"):
        num_read = 1 if config.cls_pooling == "first" else number
    if num_read == number:
        return None
    return (
        f"the classifier reads {num_read} of the {number} CLS tokens, and the others act as registers. "
        "Set `pooling='cls'` and `model_config={'cls_pooling': 'concat'}` to read all"
    )
