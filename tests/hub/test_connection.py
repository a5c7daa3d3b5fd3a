"""Retries, temporary errors and error messages of requests to the Hub."""

import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from modeling_vitcls.hub import connection
from modeling_vitcls.hub.connection import (
    HTTPError,
    is_temporary,
    retry,
)


def build_hub_error(
    status: int, message: str | None = None, reason: str = "", **headers: str
) -> HfHubHTTPError:
    """Return the error of a response of the Hub."""
    response: Any = SimpleNamespace(
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        request=None,
        status_code=status,
        reason_phrase=reason,
    )
    return HfHubHTTPError("error", response=response, server_message=message)


def chain(*errors: BaseException) -> BaseException:
    """Return the first error, with each other error as the cause of the previous error."""
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]


# Retries ------------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the waits before retries, which take no time."""
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append, monotonic=lambda: sum(waits))
    monkeypatch.setattr(connection, "time", clock)
    return waits


def fail_with(*errors: Exception) -> Callable[[], str]:
    """Return a function that raises the errors one after the other, and then returns "done"."""
    remaining = list(errors)

    def act() -> str:
        if remaining:
            raise remaining.pop(0)
        return "done"

    return act


def test_failed_attempts_are_repeated_after_the_given_or_the_requested_waits(
    waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    requested = [
        build_hub_error(429, reason="Busy", Retry_After=wait)
        for wait in ("2", "3", "86400", "Mon, 1 Jan")
    ]
    act = fail_with(build_hub_error(503, reason="Down"), build_hub_error(503), *requested)

    assert retry(act, "looking", waits=(0.5, 1.0, 1.0, 4.0, 4.0, 4.0)) == "done"
    assert waits == [0.5, 1.0, 2.0, 4.0, 300.0, 4.0]
    assert caplog.text.count("looking: HTTP 429, Busy; trying again in") == 4


@pytest.mark.parametrize(
    ("status", "times", "expected"),
    [
        (503, None, [1.0, 2.0, 4.0, 8.0]),
        (503, (), []),
        (404, (9.0,), []),
    ],
)
def test_the_error_is_raised_after_the_last_attempt_or_if_it_is_permanent(
    status: int, times: tuple[float, ...] | None, expected: list[float], waits: list[float]
) -> None:
    with pytest.raises(HfHubHTTPError):
        retry(fail_with(*[build_hub_error(status)] * 5), "looking", waits=times)
    assert waits == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        *((build_hub_error(status), True) for status in (408, 409, 412, 429, 500, 502, 503, 504)),
        *((build_hub_error(status), False) for status in (401, 403, 404)),
        (chain(build_hub_error(403), build_hub_error(500)), False),  # the status of the outer error
        (HTTPError("x"), True),
        *((error("x"), True) for error in (ConnectionResetError, RuntimeError)),
        (TimeoutError("x"), False),
        (chain(OSError("x"), HTTPError("y")), True),
        (json.JSONDecodeError("x", "<html>", 0), True),
        (PermissionError("x"), False),
        (ValueError("x"), False),
    ],
    ids=repr,
)
def test_only_errors_that_may_pass_are_temporary(error: BaseException, expected: bool) -> None:
    assert is_temporary(error) is expected


# Silence ------------------------------------------------------------------------------------------


def test_timeouts_and_progress_bars_are_restored() -> None:
    enable_progress_bars()  # commands in this process turn them off
    before = get_session().timeout

    with (
        suppress(ZeroDivisionError),
        connection.set_hub_timeout(3.5),
        connection.hide_hub_progress_bars(),
    ):
        with connection.hide_hub_progress_bars():
            pass
        assert get_session().timeout.read == 3.5
        assert are_progress_bars_disabled()
        raise ZeroDivisionError

    assert get_session().timeout == before
    assert not are_progress_bars_disabled()
