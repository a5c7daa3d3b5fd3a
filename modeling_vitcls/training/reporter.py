"""Output of a run: progress, metrics.jsonl, trackers, summary, and run statistics.

In a terminal, a run shows a progress bar; otherwise, a run prints one line per record. Only the
main process prints and writes.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ..data.aspect_ratio import get_resize
from ..data.sampling import BatchPlan
from ..data.splits import HELD_OUT_SPLITS, TrainingData
from ..inference.intervals import MIN_CORRECTED_IMAGES
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..runtime.files import replace_control_characters, write_atomically
from ..runtime.progress import LINE_SECONDS
from ..runtime.system import describe_device, get_versions


MAX_NAMED_CLASSES = 12  # in the summary


class Reporter:
    """Output of one run. Use `progress` as a context manager around the training loop."""

    def __init__(self, metrics_file: Path, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.console = Console(
            emoji=False, quiet=not accelerator.is_main_process, soft_wrap=True, highlight=False
        )
        self.metrics_file = metrics_file
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (accelerator.is_main_process and self.console.is_terminal),
            speed_estimate_period=math.inf,
        )
        self.progress_task = self.progress.add_task("training", total=None)
        self.last_line_time = self.progress.get_time()  # of the last line about steps
        # metrics of evaluations that lines contain, set by the run
        self.printed_metrics: tuple[str, ...] = ()

    def print_line(self, name: str, text: str) -> None:
        """Print one line of the summary."""
        # Names of classes and folders may contain brackets, which rich would take for styles.
        self.console.print(f"{name:<9} {text}", markup=False)

    def print_lines(self, lines: Mapping[str, str | None]) -> None:
        """Print the lines that have a text."""
        for name, text in lines.items():
            if text:
                self.print_line(name, text)

    def warn(self, message: str) -> None:
        """Print a highlighted warning."""
        self.console.print(f"WARNING: {message}", style="bold yellow", markup=False)

    def start_after(self, step: int, num_steps: int) -> None:
        """Start the output of a run that continues after `step`.

        In metrics.jsonl, keep the records up to this step, and remove the records of later steps,
        which the resumed run repeats.
        """
        if self.accelerator.is_main_process:
            lines = []
            if self.metrics_file.exists():
                lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
            earlier_lines = []
            for line in lines:
                with suppress(ValueError):  # the last line of a killed run may be truncated
                    if json.loads(line)["step"] <= step:
                        earlier_lines.append(f"{line}\n")
            with write_atomically(self.metrics_file) as temporary_file:
                temporary_file.write_text("".join(earlier_lines), encoding="utf-8")

        self.progress.reset(self.progress_task, total=num_steps, completed=step)
        self.last_line_time = self.progress.get_time()

    def show_step(self, step: int) -> None:
        """Move the progress bar."""
        self.progress.update(self.progress_task, completed=step)

    def print_if_due(self, step: int) -> None:
        """Print the step in a log file if the last line is older than 30 seconds."""
        is_due = self.progress.get_time() - self.last_line_time >= LINE_SECONDS
        if self.progress.disable and is_due and self.accelerator.is_main_process:
            self.print_step(step)

    def print_step(self, step: int, text: str = "", score_text: str = "") -> None:
        """Print a line about a step, with the remaining time."""
        task = self.progress.tasks[0]
        remaining_time = ""
        if task.time_remaining:
            remaining_time = f"{timedelta(seconds=task.time_remaining)} left"
        columns = [f"step {step}/{task.total}", text, remaining_time, score_text]
        self.console.print("  ".join(filter(None, columns)), markup=False)
        self.last_line_time = self.progress.get_time()

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, print it, and send its numbers to the trackers.

        Raise OSError on the main process if metrics.jsonl cannot be written.
        """
        self.accelerator.log(flatten_record(record), step=record["step"])
        if not self.accelerator.is_main_process:
            return

        # NaN is no JSON, so values that may be NaN are None by now.
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

        text = (
            f"epoch {record['epoch']:.1f}  loss {record['loss']:.3f}  "
            f"lr {record['learning_rate']:.1e}  {record['images_per_second']:.0f} images/s"
        )
        split = "selection" if any(name.startswith("selection_") for name in record) else "held_out"
        names = [name for name in self.printed_metrics if f"{split}_{name}" in record]
        scores = ", ".join(format_metric(name, record[f"{split}_{name}"]) for name in names)
        score_text = f"{split.replace('_', ' ')}: {scores}" if scores else ""

        self.progress.update(self.progress_task, completed=record["step"], description=text)
        if self.progress.disable:
            self.print_step(record["step"], text, score_text)
        elif score_text:
            self.progress.console.print(
                f"epoch {record['epoch']:>5.1f}  {score_text}", markup=False
            )


def format_metric(name: str, value: float | None) -> str:
    formats = {"loss": ".4g", "rank": ".1f", "cosine": ".3f"}
    text = "unknown" if value is None else f"{value:{formats.get(name.rpartition('_')[2], '.2%')}}"
    return f"{name.replace('_', ' ')} {text}"


def flatten_record(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten a nested record for trackers, which take numbers by name.

    For example, `{"token_norm": {"cls[0]": 1.0}}` becomes `{"token_norm/cls[0]": 1.0}`.
    """
    numeric_values: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            value = {f"{index:02d}": element for index, element in enumerate(value)}
        if isinstance(value, dict):
            numeric_values |= flatten_record(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            numeric_values[prefix + name] = value
    return numeric_values


# Summary and results ------------------------------------------------------------------------------


def describe_splits(
    data: TrainingData,
    processor: ViTCLSImageProcessor,
    labels_text: str,
    is_resize_known: bool,
    needs_selection: bool,
) -> dict[str, str]:
    """Return the summary lines about the data.

    `is_resize_known` is False if the run chooses the geometry later.
    """
    lines = {}
    if data.train_split in HELD_OUT_SPLITS:
        lines["split"] = (
            f"training uses the split {data.train_split!r}, because no split is named 'train'"
        )
    middle_text = ""
    if data.selection is not None:
        middle_text = f"{len(data.selection):,} of {data.selection_name}, "
    held_out = "none held out"
    if len(data.held_out):
        held_out = f"{len(data.held_out):,} held-out images ({data.held_out_name})"
    lines["data"] = (
        f"{data.name}: {len(data.train):,} training images, {middle_text}{held_out}; {labels_text}"
    )
    class_text = describe_class_sizes(data)
    if class_text:
        lines["classes"] = class_text
    if data.selection is not None and needs_selection:
        lines["selection"] = (
            f"the best checkpoint is selected on {len(data.selection):,} separate images "
            f"({data.selection_name})"
        )
    if is_resize_known:
        lines["resize"] = get_resize(processor)
    return lines


def describe_class_sizes(data: TrainingData) -> str:
    """Return the number of images of each class or, of many classes, the smallest and largest.

    It is "" for images without labels, and for several tasks.
    """
    parts: list[Any] = [data.train, data.held_out]
    if data.selection is not None:
        parts.append(data.selection)
    if not data.label_space.columns or data.label_space.kind == "multi_task":
        return ""
    has_lists = data.label_space.kind == "multi_label_classification"
    counts: Counter[int] = Counter()
    for part in parts:
        counts.update(chain.from_iterable(part.labels) if has_lists else part.labels)
    names = map(replace_control_characters, data.label_space.names)
    sizes = [(counts[label], name) for label, name in enumerate(names)]
    if len(sizes) > MAX_NAMED_CLASSES:
        (smallest, first), (largest, last) = min(sizes), max(sizes)
        return f"from {smallest:,} images ({first}) to {largest:,} ({last})"
    return ", ".join(f"{name}: {size:,}" for size, name in sizes)


def format_result(metrics: dict[str, Any], names: tuple[str, ...]) -> str:
    """Format the metrics `names` of the final evaluation as one line of text."""
    names = tuple(name for name in names if name in metrics)
    if not names:
        return (
            "the model was trained on all images and not evaluated, because `held_out_fraction` "
            "is 0"
        )
    texts = [format_metric(name, metrics[name]) for name in names]
    if "accuracy_interval" in metrics:  # the mean over several tasks has none
        texts = [format_accuracy(metrics), *texts[1:]]
    return f"{', '.join(texts)} on {metrics['num_images']:,} held-out images"


def format_accuracy(metrics: dict[str, Any]) -> str:
    """Format an accuracy with its interval; with few images, as a fraction without a percentage."""
    low, high = (100 * value for value in metrics["accuracy_interval"])
    num_images = metrics["num_images"]
    if num_images < MIN_CORRECTED_IMAGES:
        right = round(metrics["accuracy"] * num_images)
        return f"{right} of {num_images} right (95%: {low:.0f} to {high:.0f}%)"
    return f"accuracy {metrics['accuracy']:.2%} (95% interval: {low:.1f} to {high:.1f})"


def describe_model(
    source: str, model: Any, forward_flops: int, is_pooling_known: bool
) -> dict[str, str]:
    """Return the summary lines about the model.

    `is_pooling_known` is False if the run chooses the tokens of the classifier later.
    """
    config = model.config
    token_counts = {name: count for name, count in count_tokens(config).items() if count}
    layout_text = " | ".join(f"{count} {name}" for name, count in token_counts.items())
    height, width = config.image_height_width
    pooling_text = f", pooling {config.pooling}" if is_pooling_known else ""
    return {
        "model": f"{source}: {count_parameters(model):,} parameters, "
        f"{count_parameters(model, only_trainable=True):,} trainable, {config.num_hidden_layers} "
        f"layers of width {config.hidden_size}{pooling_text}",
        "tokens": f"[ {layout_text} ] = {sum(token_counts.values())} for {height} x {width} "
        f"pixels, {forward_flops / 1e9:.3g} GFLOP per image",
    }


def describe_batches(plan: BatchPlan) -> str:
    """Return the summary line about the batches."""
    return (
        f"{plan.images_per_step} images per step = {plan.batch_size} x {plan.accumulation_steps} "
        f"accumulated x {plan.num_processes} process(es); {plan.num_steps:,} steps = "
        f"{plan.count_epochs(plan.num_steps):.1f} epochs"
    )


def build_model_record(model: Any) -> dict[str, Any]:
    """Build the fields of results.json about the model, the device and the versions."""
    return {
        "num_parameters": count_parameters(model),
        "token_layout": count_tokens(model.config),
        "device": describe_device(),
        "mixed_precision": AcceleratorState().mixed_precision,
        "num_processes": AcceleratorState().num_processes,
        "versions": get_versions(),
    }


def count_tokens(config: ViTCLSConfig) -> dict[str, int]:
    """Return the number of tokens in each token group, at the model's image size."""
    token_indices = range(config.token_layout.get_num_tokens(*config.grid_size))
    return {name: len(token_indices[group]) for name, group in config.token_layout.items()}


def count_parameters(model: nn.Module, only_trainable: bool = False) -> int:
    return sum(
        parameter.numel()
        for parameter in model.parameters()
        if parameter.requires_grad or not only_trainable
    )
