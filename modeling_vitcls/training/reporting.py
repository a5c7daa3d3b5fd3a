"""What a run says: a summary, progress (a bar on a terminal, plain lines elsewhere), metrics.jsonl.

Only the main process prints and writes.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Progress of one run; use it as a context manager around the training loop."""

    def __init__(self, metrics_file: Path, num_steps: int, is_main_process: bool) -> None:
        self.console = Console(quiet=not is_main_process, soft_wrap=True, highlight=False)
        self.is_main_process = is_main_process
        self.metrics_file = metrics_file
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (is_main_process and self.console.is_terminal),
        )
        self.task = self.progress.add_task("training", total=num_steps)
        self.num_steps = num_steps

    def say(self, name: str, what: str) -> None:
        """One line of the summary."""
        self.console.print(f"{name:<9} {what}", markup=False)

    def warn(self, message: str) -> None:
        """A line that should not be missed."""
        self.console.print(f"WARNING: {message}", style="bold yellow", markup=False)

    def __enter__(self) -> Self:
        if self.is_main_process:
            self.metrics_file.write_text("", encoding="utf-8")
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl and show it."""
        if not self.is_main_process:
            return
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        text = f"epoch {record['epoch']:.1f}  loss {record['loss']:.3f}  {record['images_per_second']:.0f} images/s"
        held_out = f"  held out {record['held_out_accuracy']:.2%}" if "held_out_accuracy" in record else ""
        if self.progress.disable:
            self.console.print(f"step {record['step']}/{self.num_steps}  {text}{held_out}", markup=False)
            return
        self.progress.update(self.task, completed=record["step"], description=text)
        if held_out:
            self.progress.console.print(f"epoch {record['epoch']:>5.1f}{held_out}", markup=False)
