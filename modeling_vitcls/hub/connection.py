"""Requests to the Hub: timeouts of a push, silenced libraries, and one-line error messages.

huggingface_hub itself repeats failed downloads and uploads of files, with a warning for each.
"""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_session, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging

from ..runtime.errors import format_error


# Base class of the errors in the HTTP library (httpx or httpx2) that huggingface_hub uses.
HTTPError: type[Exception] = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
# Errors that requests to the Hub can raise: OSError for a refused connection, RuntimeError for a
# failed upload, and ValueError for invalid metadata.
HUB_ERRORS: tuple[type[Exception], ...] = (HTTPError, OSError, RuntimeError, ValueError)

SILENCE_LOCK = threading.RLock()


def check_is_online() -> None:
    """Raise ValueError if offline mode is set."""
    if is_offline_mode():
        raise ValueError(
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so the Hub cannot be reached. Unset "
            "the variable, or push later"
        )


@contextmanager
def name_cache() -> Iterator[None]:
    """Name HF_HOME in the errors of the block about a cache that cannot be written to.

    In a container, the home folder often belongs to another user.
    """
    try:
        yield
    except OSError as error:
        caches = (Path(constants.HF_HOME), Path(constants.HF_HUB_CACHE))
        file = Path(error.filename or "")
        is_cache = any(file in (cache, *cache.parents) or cache in file.parents for cache in caches)
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not is_cache:
            raise
        remedy = "Set HF_HOME to a folder that can be written to"
        raise OSError(error.errno, f"{error.strerror}. {remedy}", error.filename) from error


@contextmanager
def set_hub_timeout(seconds: float) -> Iterator[None]:
    """Set a timeout for requests to the Hub within the block.

    By default, only file downloads have a timeout in huggingface_hub (HF_HUB_DOWNLOAD_TIMEOUT). All
    threads share one client.
    """
    # The process has only this client. The old value is put back, because a later download must not
    # inherit a limit that suits one short request.
    client = get_session()
    previous_timeout = client.timeout
    client.timeout = seconds
    try:
        yield
    finally:
        client.timeout = previous_timeout


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Turn off transformers' progress bars and warnings within the block.

    Other threads wait, because the settings belong to the whole process.
    """
    with SILENCE_LOCK:
        # What the caller has silenced stays silent afterwards, so both settings are read before
        # they are changed.
        verbosity = transformers_logging.get_verbosity()
        had_progress_bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if had_progress_bars:
                transformers_logging.enable_progress_bar()


@contextmanager
def hide_hub_progress_bars() -> Iterator[None]:
    """Turn off huggingface_hub's progress bars within the block."""
    were_hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_hidden:
            enable_progress_bars()


def iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its chain of causes (`__cause__`)."""
    while error is not None:
        yield error
        error = error.__cause__


def format_hub_error(error: BaseException) -> str:
    """Say in one line what an error and its causes say."""
    messages: list[str] = []
    for cause in iter_causes(error):
        message = format_error(cause)
        if isinstance(cause, HfHubHTTPError):
            reason = cause.server_message or cause.response.reason_phrase
            message = " ".join(f"HTTP {cause.response.status_code}, {reason}".split())
        # Errors that wrap another error often quote it, and one line should say a thing once.
        if not any(message.rstrip(".") in earlier_message for earlier_message in messages):
            messages.append(message.rstrip("."))
        # The server's message is the most precise one, and the causes repeat it.
        if isinstance(cause, HfHubHTTPError):
            break
    return ": ".join(messages)


def describe_no_response(error: BaseException) -> str:
    """Say that the Hub does not respond, with the reason and a remedy."""
    return (
        f"the Hub at {constants.ENDPOINT} does not respond: {format_hub_error(error)}. Check the "
        "network, proxies and HF_ENDPOINT"
    )
