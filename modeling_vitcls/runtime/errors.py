"""Errors and warnings in one line, missing extras, and errors that all processes of a run raise."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from .files import replace_control_characters


logger = logging.getLogger(__name__)

MAX_MESSAGE_LENGTH = 400  # Maximum length of a formatted error message, in characters
# What the system, Python, PyTorch, the loader and libraries in Rust say, in lower case. Only the
# system numbers its errors, so their text is all that they have in common.
REMEDIES = {
    ("no space left on device", "quota exceeded", "not enough disk space"): (
        "no space is left on the device. Free space, also for the cache (HF_HOME), then repeat"
    ),
    ("too many open files",): (
        "too many files are open. Raise the limit (ulimit -n), or end other programs"
    ),
    ("can't start new thread",): (
        "there are too many threads. Raise the limits (ulimit -u, -v), or end other programs"
    ),
    ("memoryerror", "allocate memory", "out of memory", "failed to map segment", "bad_alloc"): (
        "there is not enough memory. End other programs, raise the limit (ulimit -v), or use a "
        "smaller batch"
    ),
    ("surrogates not allowed",): "the name of a file or folder is not valid UTF-8. Change it",
}
ALL_PROCESSES_NOTE = "on all processes"  # Note that marks errors that are raised on all processes


def format_error(error: BaseException) -> str:
    """Shorten the message of an error to one line of at most `MAX_MESSAGE_LENGTH` characters.

    Characters that cannot be printed, such as invalid bytes in file names, are replaced. If there is
    no message, the name of the error type is returned.
    """
    message = replace_control_characters(" ".join(str(error).split())) or type(error).__name__
    return (
        message if len(message) <= MAX_MESSAGE_LENGTH else f"{message[: MAX_MESSAGE_LENGTH - 3]}..."
    )


def describe_error(error: BaseException) -> str:
    """Say what is wrong for a person: with the file and the reason if a file cannot be used."""
    exhaustion = describe_exhaustion(error)
    if not isinstance(error, OSError):
        return exhaustion or str(error)
    if error.errno is None:
        return str(error)
    file = error.filename2 or error.filename  # a rename has two
    if file is None:
        return exhaustion or str(error)
    reason = exhaustion or f"{error.strerror}. Check the path and its permissions"
    return f"cannot use {file}: {reason}"


@contextmanager
def explain_damage(file: Path, remedy: str) -> Iterator[None]:
    """Raise the errors of pyarrow, pandas and NumPy about a damaged file as one-line ValueErrors.

    Errors about the machine, such as a missing permission or too little memory, are not converted.
    """
    try:
        yield
    except Exception as error:  # Damaged data raises almost any
        # The system gives its errors a number. Without one, pyarrow complains about the contents.
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        reason = format_error(error).rstrip(".")
        raise ValueError(f"cannot read {file}: {reason}. {remedy}") from error


def describe_exhaustion(error: BaseException) -> str | None:
    """Say that the machine lacks memory, files, threads or space; None for other errors."""
    text = f"{type(error).__name__}: {error}".lower()
    for messages, remedy in REMEDIES.items():
        if any(words in text for words in messages):
            return remedy
    return None


def format_name_list(names: Sequence[str], max_names: int = 3) -> str:
    """Shorten a list of names for a message: the first ones, and how many follow."""
    suffix = f" and {len(names) - max_names:,} more" if len(names) > max_names else ""
    return ", ".join(map(replace_control_characters, names[:max_names])) + suffix


@cache
def warn_on_first_process(message: str) -> None:
    """Log a warning once, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", message)


@contextmanager
def mark_errors_of_all_processes() -> Iterator[None]:
    """Mark errors raised in the block as raised on all processes.

    The message is then printed by one process.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        error.add_note(ALL_PROCESSES_NOTE)
        raise


def is_raised_on_all_processes(error: BaseException) -> bool:
    """Check whether an error was marked by `mark_errors_of_all_processes`."""
    return ALL_PROCESSES_NOTE in getattr(error, "__notes__", ())


def describe_installation(extra: str) -> str:
    """Say how to install an extra of this package, which is not on PyPI."""
    return f'Run pip install ".[{extra}]" in the checkout of this package'


class RunStopped(Exception):
    """Exception that ends a training run early on all processes, with a one-line message for the user."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status  # Exit status of the program
