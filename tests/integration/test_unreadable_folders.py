"""A class folder without read permission is an error, and never a result without its images.

The user root can read all folders, unless its thread gives up two capabilities (Linux).
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_in_process import run_here
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config, save_with_processor

from modeling_vitcls import ViTCLSForImageClassification


pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.skipif(
        os.name != "posix" or (os.geteuid() == 0 and sys.platform != "linux"),
        reason="root can read all folders",
    ),
]

CAPABILITIES_VERSION_3 = 0x20080522
CAN_READ_ALL = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


@pytest.fixture
def photos(tmp_path: Path) -> Iterator[Path]:
    """Return photographs of three classes, the second of which cannot be read."""
    folder = write_photos(tmp_path / "photos", range(8), "cat", "dog", "fox")
    (folder / "dog").chmod(0)
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION_3, 0)
    capabilities = (ctypes.c_uint32 * 6)()
    libc.capget(header, capabilities)
    effective = capabilities[0]
    capabilities[0] = effective & ~CAN_READ_ALL
    libc.capset(header, capabilities)
    yield folder
    capabilities[0] = effective
    libc.capset(header, capabilities)
    (folder / "dog").chmod(0o700)


def check_error(status: int, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    error = capsys.readouterr().err
    assert status == 1, error
    assert error.count("\n") == 1, error
    assert f"cannot read the folder {folder}" in error


def test_predict_does_not_leave_out_a_folder(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ViTCLSForImageClassification(build_tiny_config())
    flags = ["--model", str(save_with_processor(model, tmp_path / "model"))]
    status = run_here("predict", *flags, str(photos), "--output", str(tmp_path / "labels.csv"))
    check_error(status, capsys, photos / "dog")
    assert not (tmp_path / "labels.csv").exists()


def test_finetune_does_not_leave_out_a_class(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        "--model vitcls-tiny --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 "
        "--image-size 32 --patch-size 8 --max-steps 1 --batch-size 4 --num-workers 0 --no-report"
    )
    folders = ("--dataset", str(photos), "--output-dir", str(tmp_path / "run"))
    check_error(run_here("finetune", *folders, *flags.split()), capsys, photos / "dog")
    assert not (tmp_path / "run" / "model.safetensors").exists()
