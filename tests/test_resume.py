"""Stop and resume: a run that was killed or asked to stop ends as the one that was not, to the bit.

Runs are killed with `kill -9` at random steps and resumed with the same command and --resume. Most start as forks of
this process, which has loaded everything already; some through the real `accelerate launch`, in one and two processes.
"""

import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from test_distributed import loopback

import modeling_vitcls.training.finetune  # noqa: F401  # for the forks


pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = REPOSITORY / "scripts"
FORK = multiprocessing.get_context("fork")
ENVIRONMENT = {
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",
    "GLOO_SOCKET_IFNAME": loopback(),
}
TINY = (
    "--model vitcls-tiny --hidden-size 32 --num-hidden-layers 2 --num-attention-heads 2 --intermediate-size 64 "
    "--image-size 32 --patch-size 16 --num-register-tokens 2 --drop-path-rate 0.2"
)
# 36 pictures: 4.5 steps an epoch, 23 steps. Checkpoints and lines of metrics fall on different steps.
RUN = (
    f"{TINY} --epochs 5 --batch-size 8 --learning-rate 3e-3 --num-workers 0 --save-every 3 --log-every 2 "
    "--health-every 0"
)
EVERYTHING = (
    f"{RUN} --batch-size 4 --gradient-accumulation-steps 2 --ema-decay 0.9 --mixup 0.4 --cutmix 1 "
    "--random-erasing 0.3 --auto-augment trivial --layer-decay 0.8"
)
NUM_STEPS = 23
NOT_COMPARED = ("images_per_second", "peak_memory_mb", "seconds", "versions")


# Runs ----------------------------------------------------------------------------------------------------------------


class Started:
    """A run in its own process or processes."""

    def __init__(self, folder: Path, flags: str, process: Any) -> None:
        self.folder = folder
        self.flags = flags
        self.process = process

    @property
    def output(self) -> str:
        return log_of(self.folder).read_text(encoding="utf-8")

    def wait(self) -> int:
        """Until it has ended by itself: its exit status."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait(timeout=240)
        self.process.join(timeout=240)
        return self.process.exitcode

    def wait_for_step(self, step: int) -> None:
        """Until it has logged a step."""
        deadline = time.monotonic() + 120
        while steps_logged(self.folder) < step:
            assert time.monotonic() < deadline and self.is_alive(), self.output
            time.sleep(0.002)

    def is_alive(self) -> bool:
        process = self.process
        return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()

    def kill(self) -> None:
        """`kill -9`, with its children: a launcher's are in sessions of their own."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for member in family:
            member.kill()
        self.wait()
        psutil.wait_procs(family, timeout=20)


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def steps_logged(folder: Path) -> int:
    try:
        return json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def command(folder: Path, flags: str) -> list[str]:
    return [str(SCRIPTS / "finetune.py"), "--output-dir", str(folder), *flags.split()]


def fork(folder: Path, flags: str, rank: int = 0, world: int = 1, port: int = 0) -> Any:
    """Run the script in a fork of this process."""
    process = FORK.Process(target=run_script, args=(folder, flags, rank, world, port))
    process.start()
    return process


def run_script(folder: Path, flags: str, rank: int, world: int, port: int) -> None:
    output = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.update(ENVIRONMENT)
    if world > 1:
        several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        several |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in several.items()})
    torch.set_num_threads(1)
    sys.argv = command(folder, flags)
    sys.path.insert(0, str(SCRIPTS))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def start(folder: Path, flags: str) -> Started:
    return Started(folder, flags, fork(folder, flags))


def launch(folder: Path, flags: str, processes: int = 1, *launcher_flags: str) -> Started:
    """Run the script through the real `accelerate launch`, as a shell would: in a process group of its own."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []  # the devices are CPUs
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    with log_of(folder).open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*launcher, *several, *launcher_flags, *command(folder, flags)],
            stdout=output,
            stderr=output,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
    return Started(folder, flags, process)


def finish(folder: Path, flags: str) -> str:
    """Run to the end, successfully; what it printed."""
    log_of(folder).unlink(missing_ok=True)
    run = start(folder, flags)
    assert run.wait() == 0, run.output
    return run.output


def refused(folder: Path, flags: str) -> str:
    """Run, and have it refused in one line."""
    log_of(folder).unlink(missing_ok=True)
    run = start(folder, flags)
    assert run.wait() == 1, run.output
    (line,) = [line for line in run.output.splitlines() if line.strip()]
    return line


def kill_and_resume(folder: Path, flags: str, kills: list[int]) -> str:
    """Kill a run with -9 once it has logged each of these steps, and at last let it end; what it printed then."""
    for number, step in enumerate(kills):
        run = start(folder, f"{flags} --resume" if number else flags)
        run.wait_for_step(step)
        run.kill()
        assert not (folder / "results.json").exists()
    return finish(folder, f"{flags} --resume")


def random_steps(count: int, seed: int) -> list[int]:
    """Rising steps to kill a run at."""
    return sorted(random.Random(seed).sample(range(2, NUM_STEPS - 1), count))


# What they left ------------------------------------------------------------------------------------------------------


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [comparable(json.loads(line)) for line in lines]


def comparable(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in NOT_COMPARED}


def assert_equal_runs(folder: Path, expected: Path) -> None:
    """Losses, learning rates, gradient norms, weights and results to the bit; speeds may differ."""
    assert records(folder) == records(expected)
    weights, expected_weights = (load_file(place / "model.safetensors") for place in (folder, expected))
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        assert torch.equal(weights[name], weight), name
    results, expected_results = (json.loads((place / "results.json").read_text()) for place in (folder, expected))
    assert comparable(results) == comparable(expected_results)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 46 pictures of noise in two classes, one darker."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = random.Random(0)
    for index in range(23):
        for name, brightest in (("dusk", 120), ("noon", 255)):
            (folder / name).mkdir(exist_ok=True)
            pixels = bytes(noise.randrange(brightest) for _ in range(3 * 20 * 24))
            Image.frombytes("RGB", (20, 24), pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Flags -> folder of a run that nobody stopped."""
    folders: dict[str, Path] = {}

    def folder_of(flags: str) -> Path:
        if flags not in folders:
            folder = tmp_path_factory.mktemp("whole") / "model"
            finish(folder, flags)
            folders[flags] = folder
        return folders[flags]

    return folder_of


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """To run in; nothing that was started there outlives the test."""
    yield tmp_path / "model"
    for process in psutil.process_iter(["cmdline"]):
        if str(tmp_path) in (process.info["cmdline"] or []):
            process.kill()


# Killed --------------------------------------------------------------------------------------------------------------


def test_killed_anywhere_with_everything_on(
    pictures: Path, folder: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """In the first epoch and after it, with accumulation, moving average, mixup and CutMix."""
    flags = f"{EVERYTHING} --dataset {pictures}"
    output = kill_and_resume(folder, flags, [3, 8, *random_steps(2, seed=1)])
    assert "resumed" in output and f"of {NUM_STEPS}" in output
    assert_equal_runs(folder, uninterrupted(flags))
