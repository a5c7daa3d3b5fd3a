"""Error messages of one line, and errors that all processes share."""

from collections.abc import Iterator
from contextlib import contextmanager


ON_ALL_PROCESSES = "on all processes"  # note on errors that every process of a run raises


@contextmanager
def on_all_processes() -> Iterator[None]:
    """Note on an error from inside this block that all processes have it: one of them says so for all."""
    try:
        yield
    except (ValueError, OSError) as error:
        error.add_note(ON_ALL_PROCESSES)
        raise


def is_on_all_processes(error: BaseException) -> bool:
    """Whether an error bears that note."""
    return ON_ALL_PROCESSES in getattr(error, "__notes__", ())


def in_one_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
