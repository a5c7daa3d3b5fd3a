"""transformers' own test mixins, for the version of transformers that is installed.

`load("test_modeling_common")` returns that module of transformers' test folder. The folder is not part of the wheel,
only of the source distribution, so the first call fetches that with pip (seconds) and unpacks it into a cache:

    <cache>/transformers-<version>/transformers_tests/   transformers' `tests`, importable as a package
                                   utils/                the one helper of its repository that the tests import

Later runs need no network. <cache> is $VITCLS_TESTS_CACHE, else `vitcls-tests` in the user's cache directory. Nothing
of it belongs in this repository. What does not live here: the tests that use the mixins (test_transformers_*.py).
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

# What the tests import and the source distribution leaves out. None of it tests a vision model.
STUBS = {
    f"{PACKAGE}/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    f"{PACKAGE}/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    f"{PACKAGE}/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url, return_url_if_not_found=True):\n    return url\n",
}


class SuiteUnavailableError(RuntimeError):
    """transformers' tests are neither cached nor to be had from the package registry."""


def load(name: str) -> ModuleType:
    """Import one module of transformers' test folder, such as "test_modeling_common".

    Skips the test module that calls it, with the reason, where the tests cannot be fetched.
    """
    try:
        _import_package()
    except SuiteUnavailableError as error:
        pytest.skip(str(error), allow_module_level=True)
    return importlib.import_module(f"{PACKAGE}.{name}")


def marker_names() -> set[str]:
    """The pytest markers that transformers' tests use; none where the tests cannot be fetched."""
    try:
        sources = [*(installed_suite() / PACKAGE).glob("*.py")]
    except SuiteUnavailableError:
        return set()
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    sources.append(Path(spec.origin).with_name("testing_utils.py"))
    return {name for source in sources for name in re.findall(r"\bmark\.(\w+)", source.read_text(encoding="utf-8"))}


def installed_suite() -> Path:
    """`fetch` for the version of transformers that is installed."""
    return fetch(importlib.metadata.version("transformers"))


def cache_dir() -> Path:
    """Where fetched test suites are kept: $VITCLS_TESTS_CACHE, else `vitcls-tests` in the user's cache directory."""
    if chosen := os.environ.get("VITCLS_TESTS_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vitcls-tests"


def fetch(version: str) -> Path:
    """The folder with the test suite of that version of transformers, downloaded if it is not cached.

    Safe to call from several processes at once. Raises SuiteUnavailableError if the suite cannot be had.
    """
    folder = cache_dir() / f"transformers-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                staged = Path(scratch) / "suite"
                _unpack(_download(version, Path(scratch)), staged)
                _add_stubs(staged)
                staged.rename(folder)  # complete or absent: an interrupted run leaves no half of a suite
    return folder


@functools.cache
def _import_package() -> None:
    """Make transformers' tests importable as PACKAGE: by file, for `tests` is our name and sys.path stays as it is."""
    folder = installed_suite() / PACKAGE
    init = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(PACKAGE, init, submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)


def _download(version: str, into: Path) -> Path:
    """Fetch transformers' source distribution with pip; without build isolation, as nothing is to be built."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    command += ["--no-deps", "--no-build-isolation", "--no-binary", "transformers", "--dest", str(into)]
    run = subprocess.run([*command, f"transformers=={version}"], capture_output=True, text=True, check=False)
    archives = list(into.glob("transformers-*.tar.gz"))
    if run.returncode or not archives:
        last_line = (run.stderr.strip().splitlines() or ["no archive came"])[-1]
        raise SuiteUnavailableError(
            f"transformers' own tests: not in {cache_dir()}, and pip could not download the source distribution of "
            f"transformers {version} ({last_line}). Run the tests once where a package registry can be reached."
        )
    return archives[0]


def _unpack(archive: Path, into: Path) -> None:
    """Take the `tests` folder out of a source distribution, as `into`/PACKAGE."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, *inner = Path(member.name).parts
            if member.isfile() and inner[:1] == ["tests"] and (source := tar.extractfile(member)):
                target = into.joinpath(PACKAGE, *inner[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())
    if not (into / PACKAGE).exists():
        raise SuiteUnavailableError(f"transformers' own tests: {archive.name} no longer contains them")


def _add_stubs(folder: Path) -> None:
    """Add what makes the unpacked tests importable; files that transformers does ship are left alone."""
    for path, text in STUBS.items():
        stub = folder / path
        stub.parent.mkdir(parents=True, exist_ok=True)
        if not stub.exists():
            stub.write_text(text)
    package = folder / PACKAGE
    for directory in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (directory / "__init__.py").touch()
