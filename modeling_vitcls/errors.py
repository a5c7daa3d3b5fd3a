"""One-line error messages, and errors that all processes of a run raise."""

from collections.abc import Iterator
from contextlib import contextmanager


MAX_LENGTH = 400  # maximum length of an error message from another library, in characters
ON_ALL_PROCESSES = "on all processes"  # note that is added to errors that every process of a run raises


def format_error(error: BaseException) -> str:
    """Return the message of an error as one line of valid Unicode with at most 400 characters. If there is no message,
    return the name of the error type.

    Invalid bytes in file names are replaced.
    """
    message = " ".join(str(error).split()).encode("utf-8", errors="replace").decode() or type(error).__name__
    return message if len(message) <= MAX_LENGTH else f"{message[: MAX_LENGTH - 3]}..."


@contextmanager
def mark_errors_of_all_processes() -> Iterator[None]:
    """Mark errors raised in the block as raised on all processes, so that only one process prints the message."""
    try:
        yield
    except (ValueError, OSError) as error:
        error.add_note(ON_ALL_PROCESSES)
        raise


def is_on_all_processes(error: BaseException) -> bool:
    """Return whether an error is marked by `mark_errors_of_all_processes`."""
    return ON_ALL_PROCESSES in getattr(error, "__notes__", ())
