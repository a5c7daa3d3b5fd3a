"""Talking to the Hub: how long to wait for it, which failures pass by themselves, and errors in one line."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session


# What any request may raise: the base class of the HTTP library that huggingface_hub uses, httpx or httpx2.
HTTPError: type[Exception] = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
# Beside that: refused connections are OSErrors, failed uploads RuntimeErrors, and wrong metadata ValueErrors.
HUB_ERRORS: tuple[type[Exception], ...] = (HTTPError, OSError, RuntimeError, ValueError)

# Timeouts and conflicts with another push, too many requests, and a Hub that is down.
PASSING_STATUSES = frozenset({408, 409, 412, 429, 500, 502, 503, 504})
# Seconds before each new attempt; the Hub may ask for more, up to its window of five minutes.
WAITS = (1.0, 2.0, 4.0, 8.0)
LONGEST_WAIT = 300.0

Result = TypeVar("Result")

log = logging.getLogger(__name__)


def check_is_online() -> None:
    """Raise ValueError where requests to the Hub are switched off."""
    if is_offline_mode():
        raise ValueError(
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so the Hub cannot be reached: unset it, or leave the "
            "push for later"
        )


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Give up on a Hub that is silent for so long; huggingface_hub itself would wait for ever."""
    session = get_session()
    before = session.timeout
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = before


def tried_again(action: Callable[[], Result], what: str, waits: Sequence[float] | None = None) -> Result:
    """What the action returns, in the end; it is repeated while it fails in a way that may pass.

    Args:
        what: such as "pushing to someone/model", for the line that is logged before each new attempt.
        waits: seconds before each new attempt; None: `WAITS`.

    Raises:
        What the action raised last.
    """
    for wait in WAITS if waits is None else waits:
        try:
            return action()
        except HUB_ERRORS as error:
            if not passes(error):
                raise
            wait = min(max(wait, requested_wait(error)), LONGEST_WAIT)
            log.warning("%s: %s; trying again in %.0f s", what, in_one_line(error), wait)
            time.sleep(wait)
    return action()


def passes(error: BaseException) -> bool:
    """Whether trying again may help."""
    chain = list(causes(error))
    statuses = [status for link in chain if (status := status_of(link)) is not None]
    if statuses:
        return statuses[0] in PASSING_STATUSES
    # A page for people in place of the JSON that was asked for comes from a proxy whose Hub is down.
    kinds = (HTTPError, ConnectionError, TimeoutError, RuntimeError, json.JSONDecodeError)
    return any(isinstance(link, kinds) for link in chain)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with, if that is the error."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def requested_wait(error: BaseException) -> float:
    """Seconds that the Hub asks us to wait before trying again; 0 where it says nothing."""
    for link in causes(error):
        if isinstance(link, HfHubHTTPError):
            value = link.response.headers.get("Retry-After", "")
            return float(value) if value.isdecimal() else 0.0
    return 0.0


def in_one_line(error: BaseException) -> str:
    """What went wrong, down to its cause, without line breaks."""
    messages: list[str] = []
    for link in causes(error):
        message = message_of(link)
        if not any(message in earlier for earlier in messages):
            messages.append(message)
        if isinstance(link, HfHubHTTPError):  # what comes before it says the same at greater length
            break
    return ": ".join(messages)


def message_of(error: BaseException) -> str:
    """What one error says, the causes aside."""
    message = str(error)
    if isinstance(error, HfHubHTTPError):
        message = f"HTTP {error.response.status_code}, {error.server_message or error.response.reason_phrase}"
    if isinstance(error, json.JSONDecodeError):
        message = "its answer is no JSON"
    return " ".join(message.split()).rstrip(".") or type(error).__name__


def endpoint() -> str:
    """The address of the Hub, which HF_ENDPOINT sets."""
    return constants.ENDPOINT
