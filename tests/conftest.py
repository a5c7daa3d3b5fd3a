"""Fixtures of all tests, the browser, and the test tiers.

A test is marked `integration` if the test, its fixtures or its helpers start processes, a compiler, a browser or a
local Hub, or train a model, or if it compares with other projects. This file sets the mark; tests that take seconds
for other reasons are marked by hand. --quick deselects integration, slow and page tests, and runs only the first case
of each parametrized test.
"""

import functools
import multiprocessing
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed
from helpers import local_hub
from helpers.accelerate_state import reset_accelerate
from helpers.fresh_processes import run_fresh
from helpers.warm_processes import READY
from playwright.sync_api import Browser, Error, expect, sync_playwright


TESTS = Path(__file__).parent
# Folders in which all tests are integration tests: export/ runs compilers, peers/ runs the test suites of other
# projects.
FOLDERS = {"export", "integration", "peers"}
# These files test HTML pages, most of them in a browser.
PAGE_FILES = (
    "analysis/test_report.py",
    "demo/test_page.py",
    "demo/test_text.py",
    "hub/test_space.py",
    "hub/test_static_space.py",
)
PAGE_TESTS = {TESTS / file for file in PAGE_FILES}
NO_BROWSER = "Chromium is required for tests of HTML pages: install it with `make browser`"
skipped_pages: list[str] = []  # ids of tests

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAGE_TIMEOUT = 60_000  # timeout of expectations about a page in milliseconds; pages take seconds on a busy machine


# Tiers ---------------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag of `make test-quick`."""
    parser.addoption("--quick", action="store_true", help="no slow or integration tests, one case of each other test")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For --quick, do not import FOLDERS and PAGE_TESTS: their imports take longer than many tests."""
    is_folder = collection_path.parent == TESTS and collection_path.name in FOLDERS
    return True if config.getoption("quick") and (is_folder or collection_path in PAGE_TESTS) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that start something outside this process as integration; for --quick, select tests."""
    cache: dict[FunctionType, bool] = {}
    for item in items:
        info = getattr(item, "_fixtureinfo", None)
        definitions = [fixture for fixtures in info.name2fixturedefs.values() for fixture in fixtures] if info else []
        functions = [getattr(item, "function", None), *(fixture.func for fixture in definitions)]
        if FOLDERS & set(item.path.relative_to(TESTS).parts) or any(uses_starter(each, cache) for each in functions):
            item.add_marker(pytest.mark.integration)
    for item in get_later_cases([item for item in items if item.get_closest_marker("slow_cases")]):
        item.add_marker(pytest.mark.slow)
    if config.getoption("quick"):
        excluded = {"slow", "slow_cases", "integration"}
        fast = [item for item in items if not excluded & {mark.name for mark in item.iter_markers()}]
        selected = set(fast) - set(get_later_cases(fast))
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
        items[:] = [item for item in items if item in selected]


def get_later_cases(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return all cases but the first of each test with parameters."""
    first_cases: dict[str, pytest.Item] = {}
    return [item for item in items if first_cases.setdefault(item.nodeid.partition("[")[0], item) is not item]


def uses_starter(function: Any, cache: dict[FunctionType, bool]) -> bool:
    """Return whether a function of the tests uses one of `get_starters`, itself or through other functions."""
    function = getattr(function, "__wrapped__", function)
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType) or function is get_starters.__wrapped__:
        return False
    if not Path(function.__code__.co_filename).is_relative_to(TESTS):
        return False
    if function not in cache:
        cache[function] = False  # for functions that call each other
        names = get_names(function.__code__)
        used = [function.__globals__.get(name) for name in names]
        modules = [each for each in used if isinstance(each, ModuleType)]
        used += [vars(module).get(name) for module in modules for name in names]  # torch.compile
        methods = [method for each in used if isinstance(each, type) for method in vars(each).values()]
        cache[function] = any(
            any(each is starter for starter in get_starters()) or uses_starter(each, cache)
            for each in [*used, *methods]
        )
    return cache[function]


@functools.cache
def get_starters() -> tuple[Any, ...]:
    """Return functions and modules that start processes, compilers, browsers, servers or training runs."""
    from modeling_vitcls.publishing import verify
    from modeling_vitcls.training.task import run_task

    modules = (multiprocessing, subprocess, torch.compile, torch.export, torch.multiprocessing, verify)
    return (local_hub.running_hub, READY, run_fresh, run_task, sync_playwright, *modules)


def get_names(code: CodeType) -> set[str]:
    """Return the names that a function uses, including its nested functions."""
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(get_names, nested))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record the tests that were skipped because no browser is installed."""
    if report.skipped and NO_BROWSER in str(report.longrepr):
        skipped_pages.append(report.nodeid)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the number of tests that were skipped because no browser is installed."""
    if skipped_pages and not hasattr(config, "workerinput"):
        print(f"{len(skipped_pages)} tests were skipped: {NO_BROWSER}")


# Fixtures ------------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed each test with a hash of its id, so that its random numbers do not depend on other tests."""
    set_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Reset the singletons in which Accelerate keeps its settings, before and after the test."""
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[local_hub.LocalHub]:
    """Start an empty Hub on this machine, to which the client of this process is logged in as `ann`."""
    with local_hub.running_hub() as running:
        running.tokens["hf_ann"] = local_hub.Token("ann")
        local_hub.point_client_at(running.url, "hf_ann", monkeypatch, tmp_path / "home")
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """Return an empty store of checkpoints, which keeps the newest two."""
    from modeling_vitcls.checkpoints import CheckpointStore

    return CheckpointStore(tmp_path / "checkpoints", num_kept=2)


@pytest.fixture(autouse=True, scope="session")
def enable_ctrl_c() -> None:
    """Restore the default handler of SIGINT: background jobs of a shell, and their child processes, ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def fast_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify pushed models in forks that have already imported torch."""

    def run(command: list[str], cwd: str, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        return run_fresh(*command[1:], environment=env, cwd=Path(cwd))

    monkeypatch.setattr("modeling_vitcls.publishing.verify.subprocess", SimpleNamespace(run=run))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace slow functions by functions that record their name and arguments; return the list of records.

    A conversion, an export or a push takes seconds. The files of each package part test the functions themselves.
    """
    records: list[tuple[Any, ...]] = []

    def replace_function(path: str, result: Any = None) -> None:
        name = path.rpartition(".")[2]

        def record(*arguments: Any, **keyword_arguments: Any) -> Any:
            records.append((name, *arguments, *sorted(keyword_arguments.items())))
            return result

        monkeypatch.setattr(f"modeling_vitcls.{path}", record, raising=name != "serve_demo")

    monkeypatch.setitem(sys.modules, "modeling_vitcls.demo.page", SimpleNamespace())  # its import is slow
    monkeypatch.setattr("modeling_vitcls.demo.page", sys.modules["modeling_vitcls.demo.page"], raising=False)
    model = SimpleNamespace(repo_id="ann/model", commit="abc", needs_token=True)
    report = SimpleNamespace(format_lines=lambda: ["verified"])
    replace_function("conversion.convert.convert_checkpoint", "report")
    replace_function("conversion.convert.write_native_model", "report")
    replace_function("commands.convert.print_report")
    replace_function("export.exporter.export_model", "report")
    replace_function("commands.export.print_report")
    replace_function("commands.export.silence_exporters")
    replace_function("commands.space.silence_exporters")
    comparison = SimpleNamespace(file="a.onnx", largest_difference=0.5, top1_agreement=0.75)
    labeled = SimpleNamespace(
        metric="accuracy", num_images=4, dataset="digits", split="test", model=0.5, files={"a.onnx": 0.25}
    )
    exported = SimpleNamespace(comparisons=[comparison], labeled=labeled)
    replace_function("export.transformers_js.export_for_transformers_js", exported)
    replace_function("inference.evaluate.evaluate_checkpoint")
    replace_function("inference.frozen.evaluate_frozen")
    replace_function("demo.page.serve_demo")
    replace_function("hub.loading.get_model_folder", "folder")
    replace_function("hub.loading.get_cached_commit", "abc")
    replace_function("publishing.adapters.check_adapter")
    replace_function("publishing.manifest.check_is_model")
    replace_function("publishing.push_permissions.check_push_permissions", "ann/id")
    replace_function("publishing.publish.push_folder", SimpleNamespace(summary="summary"))
    replace_function("publishing.verify.verify", report)
    replace_function("publishing.verify.verify_push", report)
    replace_function("publishing.space.find_published_model", model)
    replace_function("publishing.space.build_space_files", "files")
    replace_function("publishing.static_space.build_static_space_files", "static files")
    replace_function("publishing.space.push_space", SimpleNamespace(url="https://hub/space"))
    replace_function("publishing.space.write_space")
    return records


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
