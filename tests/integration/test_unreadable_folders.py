"""A class folder without read permission is an error, and never a result without its images.

The commands run in processes without the privilege to read all files. Root has it, so that root
needs setpriv (Linux).
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.fresh_processes import SCRIPT_ENVIRONMENT
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config, save_with_processor

from modeling_vitcls import ViTCLSForImageClassification


pytestmark = pytest.mark.integration

UNPRIVILEGED = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
CAN_RUN = os.name == "posix" and (os.geteuid() != 0 or shutil.which("setpriv") is not None)
needs_permissions = pytest.mark.skipif(
    not CAN_RUN, reason="root can read all folders; setpriv is missing"
)


@pytest.fixture
def photos(tmp_path: Path) -> Iterator[Path]:
    """Return photographs of three classes, the second of which cannot be read."""
    folder = write_photos(tmp_path / "photos", range(8), "cat", "dog", "fox")
    (folder / "dog").chmod(0)
    yield folder
    (folder / "dog").chmod(0o700)


def run_unprivileged(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `vitcls` in a process that can read only what its user may read."""
    prefix = UNPRIVILEGED if os.geteuid() == 0 else []
    command = [*prefix, sys.executable, "-m", "modeling_vitcls.cli", *map(str, arguments)]
    environment = os.environ | SCRIPT_ENVIRONMENT
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def check_error(ran: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert f"cannot read the folder {folder}" in ran.stderr


@needs_permissions
def test_predict_does_not_leave_out_a_folder(photos: Path, tmp_path: Path) -> None:
    model = save_with_processor(
        ViTCLSForImageClassification(build_tiny_config()), tmp_path / "model"
    )
    ran = run_unprivileged("predict", "--model", model, photos, "--output", tmp_path / "labels.csv")
    check_error(ran, photos / "dog")
    assert not (tmp_path / "labels.csv").exists()


@needs_permissions
def test_finetune_does_not_leave_out_a_class(photos: Path, tmp_path: Path) -> None:
    flags = (
        "--model vitcls-tiny --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 "
        "--image-size 32 --patch-size 8 --max-steps 1 --batch-size 4 --num-workers 0 --no-report"
    )
    folders = ("--dataset", photos, "--output-dir", tmp_path / "run")
    ran = run_unprivileged("finetune", *folders, *flags.split())
    check_error(ran, photos / "dog")
    assert not (tmp_path / "run" / "model.safetensors").exists()
