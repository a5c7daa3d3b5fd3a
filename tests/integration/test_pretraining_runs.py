"""Pre-training in two processes: stopped, killed, resumed, sharded and bfloat16 runs.

test_resumed_runs.py and test_pretrain.py resume runs in one process.
"""

import math
import os
import signal
import sys
from pathlib import Path

import pytest
from helpers.photo_folders import write_photos
from helpers.tiny_options import assert_equal_runs, read_metrics
from helpers.warm_processes import run_together, start_together, wait_for_step
from safetensors.torch import load_file


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs sessions of processes"),
]

FLAGS = (
    "--model vitcls-tiny --hidden-size 32 --num-hidden-layers 2 --num-attention-heads 2 "
    "--intermediate-size 64 --image-size 32 --patch-size 8 --num-register-tokens 2 "
    "--model-config drop_path_rate=0.2 --no-report --dataset {photos} --max-steps 12 --batch-size 4 "
    "--learning-rate 3e-3 --num-workers 0 --save-every 3 --projector-width 32 --local-crops 1"
)
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the flags of a run, except the output folder."""
    folder = tmp_path_factory.mktemp("inputs")
    write_photos(folder, range(24), "photos")
    return FLAGS.format(photos=folder).split()


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run in two processes."""
    return run_two(tmp_path_factory.mktemp("runs") / "whole", flags)


def run_two(folder: Path, flags: list[str], environment: dict[str, str] | None = None) -> Path:
    log = folder.with_suffix(".log")
    run_together(
        "pretrain.py",
        *flags,
        "--output-dir",
        folder,
        log=log,
        environment=environment,
    )
    return folder


def interrupt(
    folder: Path, flags: list[str], step: int, number: signal.Signals
) -> list[int | None]:
    """Start two processes, send them a signal after a step, and return their exit statuses."""
    log = folder.with_suffix(".log")
    arguments = [*flags, "--output-dir", str(folder)]
    started = start_together("pretrain.py", arguments, log, log)
    wait_for_step(folder, step, started[0].is_alive, log)
    for process in started:
        os.kill(process.pid, number)
    for process in started:
        process.join(240)
    return [process.exitcode for process in started]


def test_two_processes_are_stopped_killed_and_resumed(
    whole: Path, flags: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert interrupt(folder, flags, 2, signal.SIGTERM) == [128 + signal.SIGTERM] * 2
    assert list((folder / "checkpoints").glob("step-*"))
    assert interrupt(folder, [*flags, "--resume"], 6, signal.SIGKILL) == [-signal.SIGKILL] * 2
    run_two(folder, [*flags, "--resume"])
    assert_equal_runs(folder, whole)


VARIANTS: dict[str, tuple[dict[str, str], str, float]] = {
    "sharded": (SHARDED, "", 1e-4),
    "bfloat16": ({}, "--mixed-precision bf16", 0.1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sharded_weights_and_bfloat16_have_the_same_losses(
    variant: str, whole: Path, flags: list[str], tmp_path: Path
) -> None:
    environment, more_flags, tolerance = VARIANTS[variant]
    folder = run_two(tmp_path / "run", [*flags, *more_flags.split()], environment)
    for found, expected in zip(read_metrics(folder), read_metrics(whole), strict=True):
        assert math.isclose(found["loss"], expected["loss"], rel_tol=tolerance), found["step"]
    weights, expected_weights = (load_file(each / "model.safetensors") for each in (folder, whole))
    assert weights.keys() == expected_weights.keys()
