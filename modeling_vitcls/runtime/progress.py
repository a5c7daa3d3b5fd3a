"""Progress of long work: a bar in a terminal, and a line every 30 seconds in a log file.

    for batch in track(batches, "features", 245, count=len):       features 120 of 245 images

All passes over images, the steps of a run and the folds of a cross-validation use `track`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from .flags import spell_flags


LINE_SECONDS = 30.0  # Seconds between lines
PIPE_WIDTH = 100_000  # Width in characters of a table that is not printed to a terminal
SILENT_SECONDS = 5.0  # Seconds until the first line: the work may be over by then

Item = TypeVar("Item")


def build_console(**settings: Any) -> Console:
    """Build a console that prints texts as they are, without emoji, line breaks and colors."""
    console = Console(emoji=False, soft_wrap=True, highlight=False, **settings)
    if not console.is_terminal:
        console.width = PIPE_WIDTH  # Rows stay whole for programs that read a table
    return console


def print_warning(console: Console, message: str) -> None:
    """Print a highlighted warning, with the flags of the command that runs."""
    console.print(f"WARNING: {spell_flags(message)}", style="bold yellow", markup=False)


def track(
    items: Iterable[Item],
    description: str,
    total: int | None = None,
    *,
    num_done: int = 0,
    count: Callable[[Item], int] = lambda item: 1,
    unit: str = "images",
    console: Console | None = None,
    has_bar: bool = True,
) -> Iterator[Item]:
    """Yield the items, and show how many have been processed.

    Args:
        items: what is processed.
        description: what is done with the items, such as "evaluating".
        total: number of images. Default: the number of items, if it is known.
        num_done: number of images that were processed before.
        count: returns the number of images of an item.
        unit: name of what is counted, which may be empty.
        console: where the progress is shown; a quiet console shows nothing. Default: the standard
            output.
        has_bar: whether a terminal shows a bar. If False, it shows nothing.
    """
    console = console or Console()
    if total is None and isinstance(items, Sized):
        total = len(items)
    is_log = not console.is_terminal and not console.quiet
    total_text = "" if total is None else f" of {total:,}"
    num_processed = num_done
    line_time = time.monotonic() + SILENT_SECONDS

    with Progress(console=console, transient=True, disable=is_log or not has_bar) as bar:
        task = bar.add_task(description, total=total, completed=num_done)
        for item in items:
            yield item
            # The item is counted only now: the caller requests the next one when it has processed
            # this one.
            num_processed += count(item)
            bar.update(task, completed=num_processed)
            if is_log and time.monotonic() >= line_time:
                text = f"{description} {num_processed:,}{total_text} {unit}".rstrip()
                if seconds := bar.tasks[0].time_remaining:
                    text += f", {timedelta(seconds=seconds)} left"
                console.print(text, markup=False)
                line_time = time.monotonic() + LINE_SECONDS
