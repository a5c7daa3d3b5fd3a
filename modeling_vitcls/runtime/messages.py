"""Messages for the user: the package names parameters, and a command its flags.

    message = format_message("Set `num_workers=0`")     # "Set --num-workers 0" in a command (cli/flag_messages.py)

Errors are raised with the names of parameters. Lines that are printed while a function runs are
formatted here, because the function is the same in Python and in a command.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from .files import replace_control_characters


logger = logging.getLogger(__name__)

# Formatters of the commands that are running; a command may run another one. There are none in a
# Python program.
_formatters: list[Callable[[str], str]] = []


def format_message(message: str) -> str:
    """Return a message as the running program shows it to the user."""
    return _formatters[-1](message) if _formatters else message


def format_name_list(names: Sequence[str], max_names: int = 3) -> str:
    """Return the first names and the number of omitted names as text."""
    suffix = f" and {len(names) - max_names:,} more" if len(names) > max_names else ""
    return ", ".join(map(replace_control_characters, names[:max_names])) + suffix


@cache
def warn_on_first_process(message: str) -> None:
    """Log a warning once, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", message)


@contextmanager
def messages_formatted_by(formatter: Callable[[str], str]) -> Iterator[None]:
    """Show all messages of the block in the form that `formatter` returns."""
    _formatters.append(formatter)
    try:
        yield
    finally:
        _formatters.pop()
