"""What all tests need, and the browser for those of pages."""

import shutil
import signal
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import set_seed
from fresh_processes import run_fresh
from playwright.sync_api import Browser, Error, expect, sync_playwright

from modeling_vitcls.hub import verification_process


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60_000  # milliseconds that are waited for what is expected of a page; a busy machine takes seconds


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Each test draws its own random numbers, always the same ones, whichever tests ran before it."""
    set_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would every process that a test sends one to."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def verified_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh processes that verify what was pushed have torch at once."""

    def run(command: list[str], cwd: str, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        return run_fresh(*command[1:], environment=env, cwd=Path(cwd))

    monkeypatch.setattr(verification_process, "subprocess", SimpleNamespace(run=run))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A real Chromium without a window; `make test` installs one where it can."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:
            running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=2 * PATIENCE)
        except Error as error:
            pytest.skip(f"no Chromium to look at pages with ({str(error).splitlines()[0]}): run `make browser`")
        expect.set_options(timeout=PATIENCE)
        yield running
        running.close()
