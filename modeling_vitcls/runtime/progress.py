"""Progress of long work: a bar in a terminal, and at least one line every 30 seconds in a log file.

    for batch in track(batches, "features", 245, count=len):       features 120 of 245 images
    with report_work("writing report.html"):                       writing report.html, for 0:00:30

All passes over images use `track`. Short stages that follow one another share the 30 seconds: the
features of three parts, 20 seconds each, are not a silent minute.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress


LINE_SECONDS = 30  # seconds between lines
# A stage stays silent for its first 5 seconds (this part of LINE_SECONDS): it may be over by then.
SILENT_FRACTION = 1 / 6
# When the last line was printed. The stages of the process share the time until the next one.
silence = SimpleNamespace(start=-math.inf)

Item = TypeVar("Item")


def track(
    items: Iterable[Item],
    description: str,
    total: int | None = None,
    *,
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
        count: returns the number of images of an item.
        unit: name of what is counted, which may be empty.
        console: where the progress is shown; a quiet console shows nothing. Default: the standard
            output.
        has_bar: whether a terminal shows a bar. If False, it shows nothing.
    """
    console = console or Console(emoji=False, soft_wrap=True, highlight=False)
    if total is None and isinstance(items, Sized):
        total = len(items)
    has_bar = has_bar and console.is_terminal and not console.quiet
    num_processed = 0

    def describe() -> str:
        total_text = "" if total is None else f" of {total:,}"
        return f"{description} {num_processed:,}{total_text} {unit}".rstrip()

    bar = Progress(console=console, transient=True, disable=not has_bar)
    with bar, print_regularly(describe, console):
        task = bar.add_task(description, total=total)
        for item in items:
            yield item
            # The item is counted only now: the caller requests the next one when it has processed
            # this one.
            num_processed += count(item)
            bar.update(task, completed=num_processed)


@contextmanager
def report_work(description: str, console: Console | None = None) -> Iterator[None]:
    """Print a line every 30 seconds of the `with` block, unless the console is a terminal."""
    console = console or Console(emoji=False, soft_wrap=True, highlight=False)
    start_time = time.monotonic()

    def describe() -> str:
        return f"{description}, for {timedelta(seconds=round(time.monotonic() - start_time))}"

    with print_regularly(describe, console):
        yield


@contextmanager
def print_regularly(describe: Callable[[], str], console: Console) -> Iterator[None]:
    """Print the text of `describe` every 30 seconds of the `with` block, but not to a terminal."""
    if console.quiet or console.is_terminal:
        yield
        return
    earliest = time.monotonic() - (1 - SILENT_FRACTION) * LINE_SECONDS
    silence.start = max(silence.start, earliest)
    is_finished = threading.Event()

    def print_lines() -> None:
        # a thread, so that one slow item does not delay the lines
        while not is_finished.wait(max(0.0, silence.start + LINE_SECONDS - time.monotonic())):
            console.print(describe(), markup=False)
            silence.start = time.monotonic()

    # A daemon does not keep the process alive if the program ends without leaving this block.
    thread = threading.Thread(target=print_lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_finished.set()
        # Otherwise, a late line could appear below what the caller prints next.
        thread.join()
