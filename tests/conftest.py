"""Fixtures that tests of several folders use, and the browser.

The tests of a file that names one of the words in INTEGRATION are marked `integration`; a test that
only `make test-all` runs is marked `slow`. `make test-quick` runs the files that the Makefile lists.

Large libraries are imported in the fixtures, except in one test process (below): pytest-xdist
imports this file first in a process that runs no tests.
"""

import atexit
import gc
import importlib
import os
import re
import shutil
import signal
import sys
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, expect, sync_playwright
from pytest import MonkeyPatch, TempPathFactory
from xdist.scheduler import LoadFileScheduling


NO_BROWSER = "Chromium is required for tests of HTML pages: install it with `make browser`"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
GROUPS = {
    "processes": ("warm_processes",),
    "graphs": ("onnx", "demo"),
}
# what starts processes, a browser, a local Hub or training, builds graphs, or compares with peers
INTEGRATION = re.compile(
    r"(fresh|warm)_processes|subprocess|Browser|LocalHub|tiny_options|digits_models|onnx|peers\."
)
# timeout of expectations about a page in milliseconds; pages take seconds on a busy machine
PAGE_TIMEOUT = 60_000


os.environ["VITCLS_CACHE"] = "none"  # Nothing is kept, except in tests of what is
sys.path.append(str(Path(__file__).parents[1] / "scripts"))  # scripts import their siblings

gc.disable()  # while the libraries are imported
if (
    os.environ.get("PYTEST_XDIST_WORKER") == "gw1"
):  # the first processes of a new environment compile different files
    for library in ("sympy", "scipy.signal", "pandas", "sklearn.linear_model", "matplotlib.pyplot"):
        importlib.import_module(library)


def pytest_collection_finish() -> None:
    """Collect garbage of the tests only: the imported libraries are not searched each time."""
    gc.freeze()
    atexit.register(gc.unfreeze)
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as integration tests: `-m "not integration"` leaves them out."""
    for item in items:
        if INTEGRATION.search(read_file(item.path)):
            item.add_marker("integration")


@cache
def read_file(file: Path) -> str:
    return file.read_text()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed each test with a hash of its id: random numbers depend on no other test."""
    from accelerate.utils import set_seed

    set_seed(zlib.crc32(item.nodeid.encode()))


class GroupScheduling(LoadFileScheduling):
    """Give files with the same servers or large libraries to one test process."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        text = read_file(Path(__file__).parents[1] / file)
        return next(
            (name for name, words in GROUPS.items() if any(word in text for word in words)), file
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Group the files of the fast tests; the slow tests of a group would take half of the time."""
    return GroupScheduling(config, log) if config.option.markexpr == "not slow" else None


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Compute no gradients in the test."""
    import torch

    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Reset the singletons in which Accelerate keeps its settings, before and after the test."""
    from helpers.accelerate_state import reset_accelerate

    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture
def hub(monkeypatch: MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Start an empty Hub here, with a client that is logged in as `ann` and has an empty cache."""
    import transformers.utils.hub
    from helpers import local_hub
    from huggingface_hub import constants

    home = tmp_path / "home"
    with local_hub.running_hub() as running:
        running.tokens["hf_ann"] = local_hub.Token("ann")
        # for child processes
        variables = {
            "HF_ENDPOINT": running.url,
            "HF_TOKEN": "hf_ann",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        # what huggingface_hub read from the environment at import
        address = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        # a client with the former address
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        yield running


@pytest.fixture
def in_this_process(monkeypatch: MonkeyPatch) -> None:
    """Verify pushed files here and with this package, which is faster than in a new process."""
    from modeling_vitcls.publishing.verification_script import collect_outputs

    def load(source: str, auto_class: str, commit: str, *_: bool) -> Any:
        return collect_outputs(source, auto_class, {"revision": commit})

    monkeypatch.setattr("modeling_vitcls.publishing.verify.run_verification_script", load)


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: TempPathFactory) -> Path:
    """Return a folder for the fixtures of one file."""
    return tmp_path_factory.mktemp("module")


@pytest.fixture(scope="session")
def converted_encoder(tmp_path_factory: TempPathFactory) -> Path:
    """Return a converted encoder of five layers with a native side of 280 pixels."""
    from helpers.source_checkpoints import save_large_encoder

    from modeling_vitcls.conversion.convert import convert_checkpoint

    folder = tmp_path_factory.mktemp("encoder")
    source = save_large_encoder(folder / "source", num_layers=5)
    convert_checkpoint(f"transformers:{source}", folder / "vit")
    return folder / "vit"


@pytest.fixture(scope="module")
def few_digits() -> Iterator[None]:
    """Let the dataset `digits` have 240 images for training and 60 held out."""
    import sklearn.datasets
    from sklearn.utils import Bunch

    digits = sklearn.datasets.load_digits()
    few = Bunch(
        images=digits.images[:300], target=digits.target[:300], target_names=digits.target_names
    )
    with MonkeyPatch.context() as patch:
        patch.setattr("sklearn.datasets.load_digits", lambda: few)
        yield


@pytest.fixture
def time_limit() -> Iterator[None]:
    """End the tests instead of a wait without end."""
    signal.alarm(300)
    yield
    signal.alarm(0)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """Return an empty store of checkpoints, which keeps the newest two."""
    from modeling_vitcls.training.checkpoints import CheckpointStore

    return CheckpointStore(tmp_path / "checkpoints", num_kept=2)


@pytest.fixture(autouse=True, scope="session")
def enable_signals() -> None:
    """Restore the signal handlers that background jobs and `nohup` ignore."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Start a headless Chromium; `make browser` installs one."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:
            running = playwright.chromium.launch(
                executable_path=found, args=["--no-sandbox"], timeout=2 * PAGE_TIMEOUT
            )
        except Error as error:
            pytest.skip(f"{NO_BROWSER} ({str(error).splitlines()[0]})")
        expect.set_options(timeout=PAGE_TIMEOUT)
        yield running
        running.close()


@pytest.fixture(scope="module")
def by_one_process() -> dict[str, Any]:
    """Return the metrics of all scenarios of evaluation_worker.py."""
    from helpers.evaluation_worker import evaluate_all

    from modeling_vitcls.runtime.distributed import build_accelerator

    return evaluate_all(build_accelerator())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: TempPathFactory) -> Path:
    """Return a folder of nine photographs of several formats and sizes, and files that are not images."""
    from helpers.prediction_photos import sorted_photos
    from helpers.sample_photographs import photograph

    folder = tmp_path_factory.mktemp("photos")
    (folder / "inner").mkdir()
    (folder / ".hidden").mkdir()
    china = photograph("china.jpg")
    for place, file in enumerate(sorted_photos(folder)):
        left = 40 * place
        china.crop((left, 100, left + 101 - place, 177 + place)).save(file)
    (folder / "notes.txt").write_text("no image")
    china.crop((0, 0, 9, 9)).save(folder / ".hidden/z.jpg")
    return folder
