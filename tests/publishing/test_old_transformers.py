"""Pushed models with other versions of transformers: the lowest supported version, and one-line errors for older
versions.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fresh_processes import run_fresh
from helpers.local_hub import LocalHub
from helpers.tiny_models import build_tiny_config, save_with_processor

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.configuration_vitcls import MIN_TRANSFORMERS_VERSION
from modeling_vitcls.publishing.publish import push_folder
from modeling_vitcls.publishing.verify import verify


pytestmark = pytest.mark.integration


LOWEST = f"{'.'.join(map(str, MIN_TRANSFORMERS_VERSION))}.0"
MESSAGE = "This checkpoint requires transformers >= {}, but {} is installed. Run: pip install -U transformers"
LOAD = """
import sys
import transformers

for name in ("AutoConfig", "AutoModel", "AutoModelForImageClassification"):
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        print(error)
try:
    transformers.pipeline("image-classification", model=sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(error)
"""

Install = Callable[[str], Path]


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    """Install a version of transformers into a separate folder; torch is shared with this environment."""

    def install_version(version: str) -> Path:
        folder = tmp_path_factory.mktemp("transformers") / version
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
        ran = subprocess.run(
            [*command, "--target", folder, f"transformers=={version}"], capture_output=True, text=True
        )
        if ran.returncode:
            pytest.skip(f"transformers {version} cannot be installed: {ran.stderr.strip().splitlines()[-1]}")
        return folder

    return install_version


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "mine"
    save_with_processor(ViTCLSForImageClassification(build_tiny_config(num_register_tokens=1)), target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4.57.1", "5.0.0"])
def test_an_older_version_is_a_one_line_error(
    hub: LocalHub, folder: Path, tmp_path: Path, install: Install, version: str
) -> None:
    """Check a folder and the Hub."""
    push_folder(folder, "ann/mine")
    environment = os.environ | {"PYTHONPATH": str(install(version))}
    for source in (folder, "ann/mine"):
        command = [sys.executable, "-P", "-c", LOAD, str(source)]
        ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert ran.stdout.splitlines() == [MESSAGE.format(LOWEST.removesuffix(".0"), version)] * 4, ran.stderr[-2000:]


@pytest.mark.slow
def test_the_lowest_version_has_the_same_outputs(
    hub: LocalHub, folder: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = push_folder(folder, "ann/mine")
    monkeypatch.setenv("PYTHONPATH", str(install(LOWEST)))
    report = verify("ann/mine", pushed.commit, folder)
    assert {"AutoModel", "AutoModelForImageClassification", "pipeline"} <= report.differences.keys()
    assert max(report.differences.values()) <= 1e-6


def test_the_version_is_checked_before_any_other_import(tmp_path: Path, folder: Path) -> None:
    """A module that contains only a version replaces an old version of transformers."""
    shutil.copyfile(folder / "configuration_vitcls.py", tmp_path / "configuration_vitcls.py")
    (tmp_path / "transformers.py").write_text('__version__ = "4.57.1"\n')
    code = "import sys\nsys.path.insert(0, '')\ntry:\n    import configuration_vitcls\n"
    code += "except ImportError as error:\n    print(error)"
    ran = run_fresh("-P", "-c", code, cwd=tmp_path)
    assert ran.stdout.strip() == MESSAGE.format(LOWEST.removesuffix(".0"), "4.57.1"), ran.stderr
