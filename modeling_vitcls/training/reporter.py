"""Output of a run: lines, warnings, evaluations, metrics.jsonl and trackers.

summary.py and run_results.py write the texts about a run; only the `Reporter` prints, and the loop shows
its progress between the evaluations (runtime/progress.py). Only the main process prints and writes.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..inference.metrics import select_scalars
from ..inference.stated_result import format_percent
from ..runtime.files import write_text
from ..runtime.flags import spell_flags
from ..runtime.progress import build_console, print_warning


class Reporter:
    """Output of one run."""

    def __init__(self, metrics_file: Path, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.console = build_console(quiet=not accelerator.is_main_process)
        self.metrics_file = metrics_file
        self.num_steps = 0
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

        `printed_metric` is the metric of evaluations that lines contain. In metrics.jsonl, keep the
        records up to this step, and remove the records of later steps, which the resumed run repeats.
        """
        self.num_steps = num_steps
        self.printed_metric = printed_metric
        if self.accelerator.is_main_process:
            self.metrics_file.touch()
            earlier_lines = []
            for line in self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True):
                with suppress(ValueError):  # The last line of a killed run may be truncated
                    if json.loads(line)["step"] <= step:
                        earlier_lines.append(line)
            write_text(self.metrics_file, "".join(earlier_lines))

    def start_trackers(self, flags: dict[str, Any]) -> None:
        """Start the trackers of the accelerator, if it has any, with the flags of the run."""
        folder = self.metrics_file.parent.resolve()
        self.accelerator.init_trackers(folder.name, flags, {"wandb": {"dir": str(folder)}})

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, and send its numbers to the trackers.

        Raise OSError on the main process if metrics.jsonl cannot be written.
        """
        self.accelerator.log(select_scalars(record), step=record["step"])
        if not self.accelerator.is_main_process:
            return

        # NaN is no JSON, so values that may be NaN are None by now.
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def print_evaluation(self, record: dict[str, Any]) -> None:
        """Print the record of a step that was evaluated; metrics.jsonl has all records."""
        text = (
            f"step {record['step']}/{self.num_steps}  epoch {record['epoch']:.1f}  "
            f"loss {record['loss']:.3f}  lr {record['learning_rate']:.1e}  "
            f"{record['images_per_second']:.0f} images/s"
        )
        name = self.printed_metric
        for split in ("held_out", "selection"):
            if f"{split}_{name}" in record:
                num_images = record.get(f"{split}_num_images", 0)
                value = format_percent(record[f"{split}_{name}"], num_images)
                text += f"  {split}: {name} {value}".replace("_", " ")
        self.console.print(text, markup=False)
