"""Talking to the Hub: how long to wait for it, which failures pass by themselves, and errors in one line."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from huggingface_hub import constants, is_offline_mode, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http as hub_http
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from huggingface_hub.utils import logging as hub_logging


# What any request may raise: the base class of the HTTP library that huggingface_hub uses, httpx or httpx2.
HTTPError: type[Exception] = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
# Beside that: refused connections are OSErrors, failed uploads RuntimeErrors, and wrong metadata ValueErrors.
HUB_ERRORS: tuple[type[Exception], ...] = (HTTPError, OSError, RuntimeError, ValueError)

# Timeouts and conflicts with another push, too many requests, and a Hub that is down.
PASSING_STATUSES = frozenset({408, 409, 412, 429, 500, 502, 503, 504})
# Seconds before each new attempt; the Hub may ask for more, up to its window of five minutes.
WAITS = (1.0, 2.0, 4.0, 8.0)
SHORT_WAITS = (0.5, 1.0)  # of what the user waits for
LONGEST_WAIT = 300.0

LIMITED = ("connect", "read", "write", "pool")  # what the HTTP library waits for

Result = TypeVar("Result")


@dataclass
class Limits:
    """Of the blocks `with patience(...)` that are open, in any thread."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    seconds: list[float] = field(default_factory=list)

    def shortest(self) -> float | None:
        """Seconds that a request may be silent for; None outside of all blocks.

        Without the lock, which in a forked process nobody might release.
        """
        return min(list(self.seconds), default=None)


LIMITS = Limits()

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
    """Give up on a Hub that is silent for so long; huggingface_hub itself would wait for ever.

    All threads share one client: the shortest of the limits that hold at a time is that of all.
    """
    with LIMITS.lock:
        watch_clients()
        LIMITS.seconds.append(seconds)
    try:
        yield
    finally:
        with LIMITS.lock:
            LIMITS.seconds.remove(seconds)


def watch_clients() -> None:
    """Let every client that huggingface_hub makes from now on ask `LIMITS` before each request.

    It makes a new one whenever it cannot connect, in the midst of a block. Clients are made as before otherwise, also
    where the user has said how (`set_client_factory`).
    """
    make_client = hub_http._GLOBAL_CLIENT_FACTORY  # there is no other way to keep the user's own
    if isinstance(make_client, WatchedClients):
        return
    set_client_factory(WatchedClients(make_client))


@dataclass(frozen=True)
class WatchedClients:
    """Makes clients whose requests keep to `LIMITS`."""

    make_client: Callable[[], Any]

    def __call__(self) -> Any:
        """A new client."""
        client = self.make_client()

        def bound(request: Any) -> None:
            """Limit a request within a block, unless whoever sends it has said how long to wait."""
            seconds, default = LIMITS.shortest(), client.timeout.as_dict()
            if seconds is None:
                return
            asked = request.extensions.get("timeout", default)
            request.extensions["timeout"] = {
                name: seconds if asked == default or asked.get(name) is None else asked[name] for name in LIMITED
            }

        client.event_hooks["request"].append(bound)
        return client


@contextmanager
def quiet_client(with_bars: bool) -> Iterator[None]:
    """Without what huggingface_hub remarks on each request that fails, and without its bars if so asked."""
    verbosity, had_bars = hub_logging.get_verbosity(), not are_progress_bars_disabled()
    hub_logging.set_verbosity_error()
    if had_bars and not with_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if had_bars and not with_bars:
            enable_progress_bars()


def tried_again(
    action: Callable[[], Result], what: str, waits: Sequence[float] | None = None, level: int = logging.WARNING
) -> Result:
    """What the action returns, in the end; it is repeated while it fails in a way that may pass.

    Args:
        what: such as "pushing to someone/model", for the line that is logged before each new attempt.
        waits: seconds before each new attempt; None: `WAITS`.
        level: of that line.

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
            log.log(level, "%s: %s; trying again %s", what, in_one_line(error), when(wait))
            time.sleep(wait)
    return action()


def when(wait: float) -> str:
    """Such as "in 2 s", in whole seconds."""
    return f"in {wait:.0f} s" if wait >= 1 else "at once"


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


def no_answer(error: BaseException) -> str:
    """What to say where the Hub does not answer as it should: why, and what to do."""
    return f"the Hub at {endpoint()} does not answer: {in_one_line(error)}. Check the network, proxies and HF_ENDPOINT"


def endpoint() -> str:
    """The address of the Hub, which HF_ENDPOINT sets."""
    return constants.ENDPOINT
