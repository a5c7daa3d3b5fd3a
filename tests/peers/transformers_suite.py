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
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

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


def load(name: str) -> ModuleType:
    """Import one module of transformers' test folder, such as "test_modeling_common".

    The calling test module is skipped if the tests cannot be downloaded.
    """
    try:
        sys.path.append(str(fetch()))
    except subprocess.CalledProcessError as error:
        last_line = error.stderr.strip().splitlines()[-1]
        pytest.skip(
            f"transformers' tests are not in {get_cache_dir()}, and pip could not download them "
            f"({last_line}). Run the tests once where a package registry can be reached.",
            allow_module_level=True,
        )
    with patch.object(pytest.mark, "_config", None):  # the suite has markers that we do not declare
        return importlib.import_module(f"{PACKAGE}.{name}")


def get_cache_dir() -> Path:
    """Return $VITCLS_TESTS_CACHE, or `vitcls-tests` in the user's cache directory."""
    if folder := os.environ.get("VITCLS_TESTS_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vitcls-tests"


@functools.cache
def fetch() -> Path:
    """Return the folder with the tests of transformers; download them the first time.

    Several processes may call this function at once.

    Raises:
        CalledProcessError: If the tests cannot be downloaded.
    """
    version = importlib.metadata.version("transformers")
    folder = get_cache_dir() / f"transformers-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                (archive,) = _download(version, Path(scratch)).glob("transformers-*.tar.gz")
                shutil.unpack_archive(archive, scratch, filter="data")
                staged = Path(scratch) / "suite"
                staged.mkdir()
                (Path(scratch) / folder.name / "tests").rename(staged / PACKAGE)
                _add_stubs(staged)
                staged.rename(folder)  # an interrupted run leaves no partial folder
    return folder


def _download(version: str, into: Path) -> Path:
    """Download the source distribution of transformers with pip, without building it."""
    flags = (
        "--quiet --disable-pip-version-check --retries 1 --no-deps --no-build-isolation "
        "--no-binary transformers"
    )
    command = [sys.executable, "-m", "pip", "download", *flags.split(), "--dest", str(into)]
    subprocess.run(
        [*command, f"transformers=={version}"], capture_output=True, text=True, check=True
    )
    return into


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
