"""How far a prediction is: a bar on a terminal, a line now and then elsewhere; on stderr, apart from the table."""

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console

from .prediction_answers import Row


SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts rows as they pass; use it as a context manager around what consumes them."""

    def __init__(self, total: int | None, is_shown: bool) -> None:
        self.num_images = 0
        self.num_failed = 0
        self.total = total
        self.console = Console(stderr=True, quiet=not is_shown, highlight=False, soft_wrap=True)
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal or not is_shown,
        )
        self.task = self.bar.add_task("predicting", total=total)
        self.started = self.last_line = time.perf_counter()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()
        if error is None:
            self.say()

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows."""
        for row in rows:
            self.num_images += 1
            self.num_failed += row["error"] is not None
            self.bar.update(self.task, completed=self.num_images)
            if self.bar.disable and time.perf_counter() - self.last_line > SECONDS_BETWEEN_LINES:
                self.say()
            yield row

    def say(self) -> None:
        """One line."""
        self.last_line = time.perf_counter()
        speed = self.num_images / (self.last_line - self.started)
        total = "" if self.total is None else f" of {self.total:,}"
        failed = f", {self.num_failed:,} without an answer (see the column `error`)" if self.num_failed else ""
        self.console.print(f"{self.num_images:,}{total} images, {speed:,.0f} images/s{failed}", markup=False)
