"""Load test mixins of the installed version of transformers.

`load("test_modeling_common")` returns a module of transformers' test folder. Only the source
distribution contains the folder, so the first call downloads it with pip and unpacks it into a
cache:

    <cache>/transformers-<version>/transformers_tests/   transformers' `tests` as a package
                                   utils/                a helper that the tests import

Later runs require no network. <cache> is $VITCLS_TESTS_CACHE, or `vitcls-tests` in the user's cache
directory. The tests that use the mixins are in test_transformers_*.py.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock


PACKAGE = "transformers_tests"

# Modules that the tests import and the source distribution lacks. They do not test vision models.
STUBS = {
    f"{PACKAGE}/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    f"{PACKAGE}/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    f"{PACKAGE}/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/fetch_hub_objects_for_ci.py": (
        "def url_to_local_path(url, return_url_if_not_found=True):\n    return url\n"
    ),
}


class SuiteUnavailableError(RuntimeError):
    """The tests of transformers are not cached and cannot be downloaded."""


def load(name: str) -> ModuleType:
    """Import one module of transformers' test folder, such as "test_modeling_common".

    The calling test module is skipped if the tests cannot be downloaded.
    """
    try:
        _import_package()
    except SuiteUnavailableError as error:
        pytest.skip(str(error), allow_module_level=True)
    return importlib.import_module(f"{PACKAGE}.{name}")


def list_marker_names() -> set[str]:
    """Return the pytest markers in transformers' tests; empty if the tests cannot be downloaded."""
    try:
        sources = [*(get_installed_suite() / PACKAGE).glob("*.py")]
    except SuiteUnavailableError:
        return set()
    spec = importlib.util.find_spec("transformers")
    sources.append(Path(spec.origin).with_name("testing_utils.py"))
    return {
        name
        for source in sources
        for name in re.findall(r"\bmark\.(\w+)", source.read_text(encoding="utf-8"))
    }


def get_installed_suite() -> Path:
    """Return the folder with the tests of the installed version of transformers."""
    return fetch(importlib.metadata.version("transformers"))


def get_cache_dir() -> Path:
    """Return $VITCLS_TESTS_CACHE, or `vitcls-tests` in the user's cache directory."""
    if folder := os.environ.get("VITCLS_TESTS_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vitcls-tests"


def fetch(version: str) -> Path:
    """Return the folder with the tests of a version of transformers; download missing ones.

    Several processes may call this function at once.

    Raises:
        SuiteUnavailableError: If the tests cannot be downloaded.
    """
    folder = get_cache_dir() / f"transformers-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                staged = Path(scratch) / "suite"
                _unpack(_download(version, Path(scratch)), staged)
                _add_stubs(staged)
                staged.rename(folder)  # an interrupted run leaves no partial folder
    return folder


@functools.cache
def _import_package() -> None:
    """Make transformers' tests importable as PACKAGE, without changing sys.path."""
    folder = get_installed_suite() / PACKAGE
    init = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        PACKAGE, init, submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)


def _download(version: str, into: Path) -> Path:
    """Download the source distribution of transformers with pip, without building it."""
    flags = (
        "--quiet --disable-pip-version-check --retries 1 --no-deps --no-build-isolation "
        "--no-binary transformers"
    )
    command = [sys.executable, "-m", "pip", "download", *flags.split(), "--dest", str(into)]
    run = subprocess.run(
        [*command, f"transformers=={version}"], capture_output=True, text=True, check=False
    )
    archives = list(into.glob("transformers-*.tar.gz"))
    if run.returncode or not archives:
        last_line = (run.stderr.strip().splitlines() or ["no archive was downloaded"])[-1]
        raise SuiteUnavailableError(
            f"transformers' tests are not in {get_cache_dir()}, and pip could not download the "
            f"source distribution of transformers {version} ({last_line}). Run the tests once "
            "where a package registry can be reached."
        )
    return archives[0]


def _unpack(archive: Path, into: Path) -> None:
    """Unpack the `tests` folder of a source distribution into `into`/PACKAGE."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, *inner = Path(member.name).parts
            if member.isfile() and inner[:1] == ["tests"] and (source := tar.extractfile(member)):
                target = into.joinpath(PACKAGE, *inner[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())
    if not (into / PACKAGE).exists():
        raise SuiteUnavailableError(f"{archive.name} does not contain transformers' tests")


def _add_stubs(folder: Path) -> None:
    """Add the missing modules and `__init__.py` files to the unpacked tests."""
    for path, text in STUBS.items():
        stub = folder / path
        stub.parent.mkdir(parents=True, exist_ok=True)
        if not stub.exists():
            stub.write_text(text)
    package = folder / PACKAGE
    for directory in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (directory / "__init__.py").touch()
