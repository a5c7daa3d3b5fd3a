"""Output of a run: lines, warnings, progress, metrics.jsonl and trackers.

summary.py and run_results.py write the texts about a run; only the `Reporter` prints. In a terminal,
a run shows a progress bar; otherwise, a run prints its evaluations, and a line at least every 30
seconds. Only the main process prints and writes.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..inference.metrics import select_scalars
from ..inference.stated_result import format_value
from ..runtime.files import write_atomically
from ..runtime.flags import spell_flags
from ..runtime.progress import LINE_SECONDS, build_console, print_warning


class Reporter:
    """Output of one run. Use `progress` as a context manager around the training loop."""

    def __init__(self, metrics_file: Path, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.console = build_console(quiet=not accelerator.is_main_process)
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
        self.last_line_time = self.progress.get_time()  # The time of the last line about steps
        self.printed_metric = ""

    def print_line(self, name: str, text: str) -> None:
        """Print one line of the summary."""
        # The lines of several tasks are below one another.
        aligned = spell_flags(text).replace("\n", f"\n{'':10}")
        # Names of classes and folders may contain brackets, which rich would take for styles.
        self.console.print(f"{name:<9} {aligned}", markup=False)

    def print_lines(self, lines: Mapping[str, str | None]) -> None:
        """Print the lines that have a text."""
        for name, text in lines.items():
            if text:
                self.print_line(name, text)

    def warn(self, message: str) -> None:
        """Print a highlighted warning."""
        print_warning(self.console, message)

    def start_after(self, step: int, num_steps: int, printed_metric: str = "") -> None:
        """Start the output about the steps of a run that continues after `step`.

        `printed_metric` is the metric of evaluations that lines contain.
        In metrics.jsonl, keep the records up to this step, and remove the records of later steps,
        which the resumed run repeats.
        """
        self.printed_metric = printed_metric
        if self.accelerator.is_main_process:
            self.metrics_file.touch()
            earlier_lines = []
            for line in self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True):
                with suppress(ValueError):  # The last line of a killed run may be truncated
                    if json.loads(line)["step"] <= step:
                        earlier_lines.append(line)
            with write_atomically(self.metrics_file) as temporary_file:
                temporary_file.write_text("".join(earlier_lines), encoding="utf-8")

        self.progress.reset(self.progress_task, total=num_steps, completed=step)
        self.last_line_time = self.progress.get_time()

    def start_trackers(self, flags: dict[str, Any]) -> None:
        """Start the trackers of the accelerator, if it has any, with the flags of the run."""
        folder = self.metrics_file.parent.resolve()
        self.accelerator.init_trackers(folder.name, flags, {"wandb": {"dir": str(folder)}})

    def log_to_trackers(self, images: str, metrics: Mapping[str, Any], step: int) -> None:
        """Send the metrics of the start or of the saved model, which are no record of a step."""
        scalars = {f"{images}_{name}": value for name, value in select_scalars(metrics).items()}
        self.accelerator.log(scalars, step=step)

    def show_step(self, step: int) -> None:
        """Move the progress bar. In a log file, print the step if the last line is 30 seconds old."""
        self.progress.update(self.progress_task, completed=step)
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
        self.accelerator.log(select_scalars(record), step=record["step"])
        if not self.accelerator.is_main_process:
            return

        # NaN is no JSON, so values that may be NaN are None by now.
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

        text = (
            f"epoch {record['epoch']:.1f}  loss {record['loss']:.3f}  "
            f"lr {record['learning_rate']:.1e}  {record['images_per_second']:.0f} images/s"
        )
        name = self.printed_metric
        score_text = ""
        for split in ("held_out", "selection"):
            if f"{split}_{name}" in record:
                num_images = record.get(f"{split}_num_images", 0)
                value = format_value(name, record[f"{split}_{name}"], num_images)
                score_text = f"{split}: {name} {value}".replace("_", " ")

        self.progress.update(self.progress_task, description=text)
        # metrics.jsonl has all records: a log file gets those with scores.
        if score_text and self.progress.disable:
            self.print_step(record["step"], text, score_text)
        elif score_text:
            self.progress.console.print(
                f"epoch {record['epoch']:>5.1f}  {score_text}", markup=False
            )
